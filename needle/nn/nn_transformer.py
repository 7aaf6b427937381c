"""The course's import path for the modules of its Transformer assignment."""

# ruff: noqa: F401
from needle.nn.activation import Dropout, ReLU
from needle.nn.attention import AttentionLayer, MultiHeadAttention
from needle.nn.container import Residual, Sequential
from needle.nn.embedding import Embedding
from needle.nn.linear import Linear
from needle.nn.module import Module, Parameter
from needle.nn.normalization import LayerNorm1d
from needle.nn.transformer import Transformer, TransformerLayer
