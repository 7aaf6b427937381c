"""GPT: GPT-2's and nanoGPT's decoder-only Transformer. Next: llama.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from needle import nn
from needle.autograd import Tensor
from needle.files import AnyPath
from needle.init import randn, zeros
from needle.models.decoder import LanguageModel, attend_to_past, run_blocks
from needle.models.pretrained import Part, load_model, read_config, read_weights, settings


@dataclass
class GPTConfig:
    """The shape of a GPT, by nanoGPT's names; the defaults are GPT-2's smallest.

    bias: in linear layers and norms. tie_weights: the head is the table of tokens. gelu: "tanh", as
    GPT-2, or "none", exact, as nanoGPT.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    tie_weights: bool = True
    gelu: str = "tanh"
    eps: float = 1e-5


class Block(nn.Module):
    """x + attention(norm1(x)), then + down(gelu(up(norm2(x))))."""

    def __init__(self, config: GPTConfig, **place: Any) -> None:
        width = config.n_embd
        self.gelu, self.dropout = config.gelu, config.dropout
        options = config.dropout, config.bias, None, None, True  # batch first
        self.norm1 = make_norm(config, **place)
        self.attention = nn.MultiheadAttention(width, config.n_head, *options, **place)
        self.norm2 = make_norm(config, **place)
        self.up = nn.Linear(width, 4 * width, config.bias, **place)
        self.down = nn.Linear(4 * width, width, config.bias, **place)

    def drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x: Tensor, mask: Any = None, places: Any = None, keep: Any = None) -> Tensor:
        x = x + self.drop(attend_to_past(self.attention, self.norm1(x), mask, places, keep))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x)), self.gelu)))


def make_norm(config: GPTConfig, **place: Any) -> nn.LayerNorm:
    norm = nn.LayerNorm(config.n_embd, config.eps, **place)
    norm.bias = norm.bias if config.bias else None
    return norm


class GPT(LanguageModel):
    """Logits (B, T, V) for tokens (B, T): embeddings of tokens and places, blocks, a norm, a head.

    Weights begin normal with deviation 0.02, those that end a block's branch divided by
    sqrt(2 * n_layer); biases begin as zeros. (Radford et al., 2019)
    """

    def __init__(self, config: GPTConfig, device: Any = None, dtype: Any = "float32") -> None:
        place = {"device": device, "dtype": dtype}
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd, **place)
        self.places = nn.LearnedPositions(config.block_size, config.n_embd, **place)
        self.blocks = [Block(config, **place) for _ in range(config.n_layer)]
        self.norm = make_norm(config, **place)
        if not config.tie_weights:
            self.output = nn.Linear(config.n_embd, config.vocab_size, False, **place)
        for name, p in self.named_parameters():
            ends = name.endswith(("out_proj.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * config.n_layer) if ends else 0.02
            if name.endswith("bias"):
                p.data = zeros(*p.shape, **place)
            elif p.ndim > 1:
                p.data = randn(*p.shape, std=std, **place)

    def hidden(self, ids: Tensor, places: Tensor | None = None, cache: Any = None) -> Tensor:
        x = self.places(self.tokens(ids), places)
        if self.config.dropout:
            x = nn.functional.dropout(x, self.config.dropout, self.training)
        return self.norm(run_blocks(self.blocks, x, places, cache))

    def head(self, x: Tensor) -> Tensor:
        return x @ self.tokens.weight.T if self.config.tie_weights else self.output(x)

    @classmethod
    def from_pretrained(cls, folder: AnyPath, device: Any = None, dtype: Any = "float32") -> Self:
        """The GPT-2 that transformers saved in a folder: config.json, and model.safetensors or its
        shards. FileError, naming the file, where they are of something else."""
        found = read_config(folder, "gpt2")
        names = {"block_size": "n_positions", "eps": "layer_norm_epsilon"}
        names |= {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        own = settings(found, names, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        gelus = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
        name = str(found.get("activation_function", "gelu_new"))
        inner = found.get("n_inner") and 4 * own["n_embd"]
        known = name if name in gelus else "gelu_new"
        settings(found, {}, activation_function=known, n_inner=inner)
        tied = bool(found.get("tie_word_embeddings", True))
        config = GPTConfig(**own, gelu=gelus[name], tie_weights=tied)
        least = config.n_embd * (config.vocab_size + 12 * config.n_layer * config.n_embd)
        passed = ("attn.bias", "attn.masked_bias", *["lm_head.weight"][:tied])
        keys = lambda: parts_of(config), "transformer.", passed
        return load_model(lambda: cls(config, device, dtype), read_weights(folder), least, *keys)


def parts_of(config: GPTConfig) -> dict[str, list[Part]]:
    """GPT-2's tensors in transformers: its Conv1D stores (in, out), as Linear does here."""
    found = {"tokens.weight": "wte.weight", "places.weight": "wpe.weight"}
    names = {"norm1": "ln_1", "norm2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    names |= {"attention.in_proj": "attn.c_attn", "attention.out_proj": "attn.c_proj"}
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = f"ln_f.{kind}"
        for layer in range(config.n_layer):
            for own, name in names.items():
                found[f"blocks.{layer}.{own}.{kind}"] = f"h.{layer}.{name}.{kind}"
    parts = {own: [Part(f"transformer.{name}")] for own, name in found.items()}
    head = {} if config.tie_weights else {"output.weight": [Part("lm_head.weight", True)]}
    return parts | head
