"""Models that people train, each in a file of its own: gpt.py, llama.py, vit.py.

decoder.py is what language models have in common, sampling.py draws their tokens, pretrained.py
reads weights of other libraries.
"""

# fmt: off
# isort: off
from needle.models.gpt import GPT, GPTConfig
from needle.models.llama import Llama, LlamaConfig
from needle.models.vit import ViT, ViTConfig
