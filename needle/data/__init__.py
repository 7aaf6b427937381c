"""Data: datasets, transforms, and the loader that turns them into batches of Tensors.

In reading order: stream.py (random numbers per sample), batch.py, transforms.py, dataset.py, idx.py
(files), images.py (data sets by name), picture.py, folder.py, cifar.py, text.py, tokenizers.py,
workers.py, loader.py.
"""

from needle.data.cifar import CIFAR10Dataset, CIFAR100Dataset
from needle.data.dataset import Dataset, ImageDataset, NDArrayDataset, takes_indices
from needle.data.folder import ImageFolder
from needle.data.idx import parse_mnist, read_idx
from needle.data.images import DigitsDataset, MNISTDataset, digits, fashion_mnist, mnist
from needle.data.loader import DataLoader
from needle.data.stream import sample_rng
from needle.data.text import Corpus, Dictionary, TokenDataset, batchify, get_batch, read_text
from needle.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from needle.data.transforms import (
    CenterCrop,
    ColorJitter,
    Cutout,
    Mixup,
    Normalize,
    RandomCrop,
    RandomFlipHorizontal,
    Resize,
    Transform,
)
