"""The course's import path for the modules of its sequence assignment."""

# ruff: noqa: F401
from needle.nn.activation import Sigmoid
from needle.nn.embedding import Embedding
from needle.nn.module import Module, Parameter
from needle.nn.recurrent import LSTM, RNN, LSTMCell, RNNCell
