"""Models that people train, each in a file of its own: mlp_resnet.py, resnet.py, lstm.py."""

# fmt: off
# isort: off
from needle.models.lstm import LSTMLanguageModel
from needle.models.mlp_resnet import make_mlp_resnet
from needle.models.resnet import ResNet, ResNet9, resnet18, resnet50
