"""ViT: a Transformer encoder on an image's patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from needle import nn
from needle.autograd import Tensor
from needle.errors import expect
from needle.files import AnyPath
from needle.init import randn, zeros
from needle.models.pretrained import Part, load_model, read_config, read_weights, settings
from needle.ops import concatenate


@dataclass
class ViTConfig:
    """The shape of a ViT, by transformers' names; the defaults are ViT-Base's.

    num_classes: 0 for a model without a head, that gives what is hidden.
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-12
    num_classes: int = 1000
    dropout: float = 0.0


class ViT(nn.Module):
    """Logits (n, num_classes) for images (n, channels, height, width).

    Patches are projected as rows of their own, a class token comes first, places are learned; the
    layers are TransformerEncoderLayers, normalised first, and the head reads the class token.
    Without a head: what is hidden (n, 1 + patches, hidden_size). (Dosovitskiy et al., 2021)
    """

    def __init__(self, config: ViTConfig, device: Any = None, dtype: Any = "float32") -> None:
        place = {"device": device, "dtype": dtype}
        side, width = config.image_size // config.patch_size, config.hidden_size
        sizes = f"{config.image_size} and {config.patch_size}"
        fits = side and config.image_size % config.patch_size == 0
        expect(fits, f"ViT: expected an image_size of whole patches; received {sizes}")
        self.config = config
        self.patches = nn.Linear(config.num_channels * config.patch_size**2, width, **place)
        self.class_token = nn.Parameter(zeros(1, 1, width, **place))
        self.places = nn.Parameter(randn(1, 1 + side**2, width, std=0.02, **place))
        self.layers = [
            nn.TransformerEncoderLayer(
                width, config.num_attention_heads, config.intermediate_size, config.dropout, "gelu",
                config.layer_norm_eps, batch_first=True, norm_first=True, **place,
            )
            for _ in range(config.num_hidden_layers)
        ]  # fmt: skip
        self.norm = nn.LayerNorm(width, config.layer_norm_eps, **place)
        self.head = nn.Linear(width, config.num_classes, **place) if config.num_classes else None

    def forward(self, x: Tensor) -> Tensor:
        config, p = self.config, self.config.patch_size
        shape = (config.num_channels, config.image_size, config.image_size)
        wanted = f"(n, {', '.join(map(str, shape))})"
        expect(x.shape[1:] == shape, f"ViT: expected images {wanted}; received {x.shape}")
        side = config.image_size // p
        x = x.reshape((len(x), config.num_channels, side, p, side, p)).permute((0, 2, 4, 1, 3, 5))
        x = self.patches(x.reshape((len(x), side * side, -1)))
        first = self.class_token.broadcast_to((len(x), 1, config.hidden_size))
        x = concatenate([first, x], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x if self.head is None else self.head(x[:, 0])

    @classmethod
    def from_pretrained(cls, folder: AnyPath, device: Any = None, dtype: Any = "float32") -> Self:
        """The ViT that transformers saved in a folder, with or without a classifier: config.json,
        and model.safetensors or its shards. FileError, naming the file, where they are of something
        else."""
        found = read_config(folder, "vit")
        fields = ViTConfig.__dataclass_fields__
        names = {n: n for n in fields if n not in ("num_classes", "dropout")}
        own = settings(found, names, hidden_act="gelu", qkv_bias=True)
        weights = read_weights(folder)
        head = weights[1].get("classifier.weight")
        config = ViTConfig(**own, num_classes=0 if head is None else len(head))
        width, side = config.hidden_size, config.image_size // config.patch_size
        inner = config.num_hidden_layers * (4 * width + 2 * config.intermediate_size)
        passed = "pooler.dense.weight", "pooler.dense.bias"
        keys = width * (side**2 + inner), lambda: parts_of(config), "vit.", passed
        return load_model(lambda: cls(config, device, dtype), weights, *keys)


def parts_of(config: ViTConfig) -> dict[str, list[Part]]:
    """ViT's tensors in transformers, whose matrices are (out, in)."""
    width, patch = config.hidden_size, config.patch_size
    begin = "vit.embeddings"
    shape = (width, config.num_channels, patch, patch)
    projection = f"{begin}.patch_embeddings.projection"
    found = {
        "class_token": [Part(f"{begin}.cls_token")],
        "places": [Part(f"{begin}.position_embeddings")],
        "patches.weight": [Part(f"{projection}.weight", True, shape=shape)],
        "patches.bias": [Part(f"{projection}.bias")],
    }
    names = {"self_attn.out_proj": "attention.output.dense", "linear1": "intermediate.dense",
             "linear2": "output.dense"}  # fmt: skip
    norms = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = [Part(f"vit.layernorm.{kind}")]
        turned = kind == "weight"
        if config.num_classes:
            found[f"head.{kind}"] = [Part(f"classifier.{kind}", turned)]
        for layer in range(config.num_hidden_layers):
            own, name = f"layers.{layer}", f"vit.encoder.layer.{layer}"
            found[f"{own}.self_attn.in_proj.{kind}"] = [
                Part(f"{name}.attention.attention.{each}.{kind}", turned, width)
                for each in ("query", "key", "value")
            ]
            for ours, theirs in names.items():
                found[f"{own}.{ours}.{kind}"] = [Part(f"{name}.{theirs}.{kind}", turned)]
            for ours, theirs in norms.items():
                found[f"{own}.{ours}.{kind}"] = [Part(f"{name}.{theirs}.{kind}")]
    return found
