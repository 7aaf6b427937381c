"""Llama: a decoder-only Transformer with RMS norms, rotary positions, SwiGLU and grouped queries.

Next: vit.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from needle import nn
from needle.autograd import Tensor
from needle.errors import expect
from needle.files import AnyPath, FileError, reading
from needle.models.decoder import LanguageModel, attend_to_past, run_blocks
from needle.models.pretrained import Part, load_model, read_config, read_weights, settings
from needle.ops import split

SCALINGS = {"default": 0, "linear": 1, "llama3": 4}  # by rope_type: fields of RotaryScaling


@dataclass
class LlamaConfig:
    """The shape of a Llama, by transformers' names."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    head_dim: int | None = None  # hidden_size / num_attention_heads
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_scaling: nn.RotaryScaling | None = None

    @property
    def block_size(self) -> int:
        return self.max_position_embeddings

    @property
    def heads(self) -> tuple[int, int, int]:
        """How many there are of queries, of keys and values, and how wide they are."""
        width = self.head_dim or self.hidden_size // self.num_attention_heads
        return self.num_attention_heads, self.num_key_value_heads, width


class LlamaBlock(nn.Module):
    """x + attention(norm1(x)), then + down(silu(gate) * up) of norm2(x): SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig, **place: Any) -> None:
        width, (heads, groups, head_dim) = config.hidden_size, config.heads
        self.norm1 = nn.RMSNorm(width, config.rms_norm_eps, **place)
        self.attention = nn.MultiheadAttention(
            width, heads, bias=config.attention_bias, batch_first=True, num_kv_heads=groups,
            head_dim=head_dim, rotary=config.rope_theta, rotary_scaling=config.rope_scaling,
            **place,
        )  # fmt: skip
        self.norm2 = nn.RMSNorm(width, config.rms_norm_eps, **place)
        self.inner = config.intermediate_size
        self.gate_up = nn.Linear(width, 2 * self.inner, bias=False, **place)
        self.down = nn.Linear(self.inner, width, bias=False, **place)

    def forward(self, x: Tensor, mask: Any = None, places: Any = None, keep: Any = None) -> Tensor:
        x = x + attend_to_past(self.attention, self.norm1(x), mask, places, keep)
        gate, up = split(self.gate_up(self.norm2(x)), -1, (self.inner, self.inner))
        return x + self.down(nn.functional.silu(gate) * up)


class Llama(LanguageModel):
    """Logits (B, T, V) for tokens (B, T). (Touvron et al., 2023)"""

    def __init__(self, config: LlamaConfig, device: Any = None, dtype: Any = "float32") -> None:
        place = {"device": device, "dtype": dtype}
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size, **place)
        self.tokens.weight.data = self.tokens.weight.data * 0.02
        self.blocks = [LlamaBlock(config, **place) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, **place)
        if not config.tie_word_embeddings:
            self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **place)

    def hidden(self, ids: Tensor, places: Tensor | None = None, cache: Any = None) -> Tensor:
        return self.norm(run_blocks(self.blocks, self.tokens(ids), places, cache))

    def head(self, x: Tensor) -> Tensor:
        tied = self.config.tie_word_embeddings
        return x @ self.tokens.weight.T if tied else self.output(x)

    @classmethod
    def from_pretrained(cls, folder: AnyPath, device: Any = None, dtype: Any = "float32") -> Self:
        """The Llama that transformers saved in a folder: config.json, and model.safetensors or its
        shards. FileError, naming the file, where they are of something else."""
        found = read_config(folder, "llama")
        rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
        rope = rope if isinstance(rope, dict) else {"type": rope}
        found.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
        fields = LlamaConfig.__dataclass_fields__
        names = {name: name for name, x in fields.items() if x.type in ("int", "float")}
        names |= {"head_dim": "head_dim"} if found.get("head_dim") is not None else {}
        own = settings(found, names, hidden_act="silu", mlp_bias=False)
        own |= {name: bool(found.get(name)) for name in ("tie_word_embeddings", "attention_bias")}
        config = LlamaConfig(**own, rope_scaling=read_scaling(found["path"], rope))
        rows = config.vocab_size + 3 * config.num_hidden_layers * config.intermediate_size
        passed = ("inv_freq", *["lm_head.weight"][: config.tie_word_embeddings])
        keys = config.hidden_size * rows, lambda: parts_of(config), "model.", passed
        return load_model(lambda: cls(config, device, dtype), read_weights(folder), *keys)


def read_scaling(path: AnyPath, rope: dict[str, Any]) -> nn.RotaryScaling | None:
    """What config.json says of the frequencies of rotary positions."""
    kind, kinds = rope.get("rope_type", rope.get("type", "default")), [*SCALINGS]
    expected = f"rope_type {', '.join(kinds)}"
    expect(kind in kinds, f"{path}: expected {expected}; received {kind!r}", FileError)
    names = list(nn.RotaryScaling.__dataclass_fields__)[: SCALINGS[kind]]
    rope = {**rope, "path": path}
    own = settings(rope, {name: name for name in names}, partial_rotary_factor=1)
    with reading(path, f"rope_type {kind}"):
        return nn.RotaryScaling(**own) if own else None


def parts_of(config: LlamaConfig) -> dict[str, list[Part]]:
    """Llama's tensors in transformers, whose matrices are (out, in)."""
    heads, groups, width = config.heads
    inner = config.intermediate_size
    found = {"tokens.weight": [Part("model.embed_tokens.weight")]}
    found["norm.weight"] = [Part("model.norm.weight")]
    if not config.tie_word_embeddings:
        found["output.weight"] = [Part("lm_head.weight", True)]
    for layer in range(config.num_hidden_layers):
        own, name = f"blocks.{layer}", f"model.layers.{layer}"
        widths = {"q": heads * width, "k": groups * width, "v": groups * width}
        for kind in ("weight", "bias")[: 1 + config.attention_bias]:
            found[f"{own}.attention.in_proj.{kind}"] = [
                Part(f"{name}.self_attn.{each}_proj.{kind}", kind == "weight", n)
                for each, n in widths.items()
            ]
            out = Part(f"{name}.self_attn.o_proj.{kind}", kind == "weight")
            found[f"{own}.attention.out_proj.{kind}"] = [out]
        found[f"{own}.gate_up.weight"] = [
            Part(f"{name}.mlp.{each}_proj.weight", True, inner) for each in ("gate", "up")
        ]
        found[f"{own}.down.weight"] = [Part(f"{name}.mlp.down_proj.weight", True)]
        found[f"{own}.norm1.weight"] = [Part(f"{name}.input_layernorm.weight")]
        found[f"{own}.norm2.weight"] = [Part(f"{name}.post_attention_layernorm.weight")]
    return found
