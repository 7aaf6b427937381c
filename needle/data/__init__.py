"""Data: datasets, transforms, and the loader that turns them into batches of Tensors.

In reading order: stream.py (random numbers per sample), transforms.py, dataset.py, idx.py (files),
images.py (data sets by name), batch.py, workers.py, loader.py.
"""

from needle.data.dataset import Dataset, ImageDataset, NDArrayDataset, takes_indices
from needle.data.idx import parse_mnist, read_idx
from needle.data.images import DigitsDataset, MNISTDataset, digits, fashion_mnist, mnist
from needle.data.loader import DataLoader
from needle.data.stream import sample_rng
from needle.data.transforms import RandomCrop, RandomFlipHorizontal, Transform
