"""The MLP-ResNet of CMU 10-414/714: residual blocks (He et al., 2016) of linear layers.

x -> Flatten -> Linear(features, hidden) -> ReLU -> blocks -> Linear(hidden, classes)
block(x) = relu(x + branch(x)), branch: Linear(hidden, hidden // 2) -> BatchNorm -> ReLU
    -> Dropout -> Linear(hidden // 2, hidden) -> BatchNorm
"""

from __future__ import annotations

from needle import nn
from needle.backend.device import Device


def make_block(dim: int, hidden: int, dropout: float, device: Device | None) -> nn.Module:
    """One block, (n, dim) -> (n, dim)."""
    first, norm = nn.Linear(dim, hidden, device=device), nn.BatchNorm1d(hidden, device=device)
    last = nn.Linear(hidden, dim, device=device), nn.BatchNorm1d(dim, device=device)
    branch = nn.Sequential(first, norm, nn.ReLU(), nn.Dropout(dropout), *last)
    return nn.Sequential(nn.Residual(branch), nn.ReLU())


def make_mlp_resnet(
    features: int,
    hidden: int = 100,
    num_blocks: int = 3,
    classes: int = 10,
    dropout: float = 0.1,
    device: Device | None = None,
) -> nn.Module:
    """The model with random parameters, (n, ...) of so many features -> (n, classes)."""
    layers = [nn.Flatten(), nn.Linear(features, hidden, device=device), nn.ReLU()]
    for _ in range(num_blocks):
        layers.append(make_block(hidden, hidden // 2, dropout, device))
    return nn.Sequential(*layers, nn.Linear(hidden, classes, device=device))
