"""Layers, containers and losses: functions of tensors that hold parameters.

Read module.py (what a Module is), functional.py (the layers as functions), then one file for each
family: activation.py, linear.py, embedding.py, normalization.py, recurrent.py, attention.py,
transformer.py, container.py, conv.py, pool.py, loss.py; summary.py, convert.py, fold.py.
"""

# fmt: off
# isort: off
from needle.nn import functional, nn_basic, nn_conv, nn_sequence, nn_transformer
from needle.nn.activation import (ELU, GELU, Dropout, Dropout1d, Dropout2d, Dropout3d, Identity,
                                  LeakyReLU, LogSoftmax, ReLU, Sigmoid, SiLU, Softmax, Softplus,
                                  Tanh)
from needle.nn.attention import AttentionLayer, KVCache, MultiheadAttention, MultiHeadAttention
from needle.nn.container import Residual, Sequential
from needle.nn.conv import (Conv, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d,
                            ConvTranspose3d)
from needle.nn.convert import from_torch
from needle.nn.embedding import Embedding, LearnedPositions, SinusoidalPositions
from needle.nn.fold import fold_batchnorm
from needle.nn.functional import RotaryScaling
from needle.nn.linear import Flatten, Linear
from needle.nn.loss import (BCEWithLogitsLoss, CrossEntropyLoss, HuberLoss, KLDivLoss, L1Loss,
                            MSELoss, NLLLoss, SoftmaxLoss)
from needle.nn.module import Module, Parameter, RowParameter
from needle.nn.normalization import (BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm,
                                     InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LayerNorm,
                                     LayerNorm1d, RMSNorm)
from needle.nn.pool import (AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d,
                            AdaptiveMaxPool1d, AdaptiveMaxPool2d, AdaptiveMaxPool3d, AvgPool1d,
                            AvgPool2d, AvgPool3d, MaxPool1d, MaxPool2d, MaxPool3d, PixelShuffle,
                            PixelUnshuffle, Upsample)
from needle.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from needle.nn.summary import Summary, summary
from needle.nn.transformer import (Transformer, TransformerDecoder, TransformerDecoderLayer,
                                   TransformerEncoder, TransformerEncoderLayer, TransformerLayer)
