"""Models that people train, each in a file of its own: mlp_resnet.py, resnet.py, lstm.py, gpt.py,
llama.py, vit.py.

decoder.py is what language models have in common, sampling.py draws their tokens, pretrained.py
reads weights of other libraries.
"""

# fmt: off
# isort: off
from needle.models.gpt import GPT, GPTConfig
from needle.models.llama import Llama, LlamaConfig
from needle.models.lstm import LSTMLanguageModel
from needle.models.mlp_resnet import make_mlp_resnet
from needle.models.resnet import ResNet, ResNet9, resnet18, resnet50
from needle.models.vit import ViT, ViTConfig
