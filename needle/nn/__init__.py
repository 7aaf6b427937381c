"""Layers, containers and losses: functions of tensors that hold parameters.

Read module.py (what a Module is), functional.py (the layers as functions), then one file for each
family: activation.py, linear.py, embedding.py, normalization.py, recurrent.py, container.py,
loss.py; summary.py.
"""

# fmt: off
# isort: off
from needle.nn import functional, nn_basic, nn_sequence
from needle.nn.activation import (ELU, GELU, Dropout, Identity, LeakyReLU, LogSoftmax, ReLU,
                                  Sigmoid, SiLU, Softmax, Softplus, Tanh)
from needle.nn.container import Residual, Sequential
from needle.nn.embedding import Embedding
from needle.nn.linear import Flatten, Linear
from needle.nn.loss import (BCEWithLogitsLoss, CrossEntropyLoss, HuberLoss, KLDivLoss, L1Loss,
                            MSELoss, NLLLoss, SoftmaxLoss)
from needle.nn.module import Module, Parameter, RowParameter
from needle.nn.normalization import BatchNorm1d, GroupNorm, LayerNorm, LayerNorm1d, RMSNorm
from needle.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from needle.nn.summary import Summary, summary
