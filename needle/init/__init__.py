"""Initialisers: random tensors (random.py) and the weights' beginnings made of them
(initializers.py)."""

# fmt: off
# isort: off
from needle.init.initializers import (
    calculate_gain, constant, fans, kaiming_normal, kaiming_uniform, lecun_normal, lecun_uniform,
    one_hot, ones, ones_like, orthogonal, truncated_normal, xavier_normal, xavier_uniform, zeros,
    zeros_like,
)
from needle.init.random import Generator, generator, permutation, rand, randb, randint, randn, seed
