"""Residual networks for images (He et al., 2016): ResNet-9, and ResNet-18 and 50 as in torchvision.

Images are (n, channels, height, width) outside; inside all is channels last. Paths of parameters
are torchvision's, so that its files load.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, Self

from needle import nn
from needle.autograd import Tensor
from needle.errors import expect
from needle.files import AnyPath, load_tensors, reading
from needle.nn.functional import max_pool2d, relu
from needle.nn.layout import to_last


def conv(inputs: int, outputs: int, size: int, stride: int = 1, **settings: Any) -> nn.Conv2d:
    settings |= {"padding": size // 2, "channels_last": True}
    return nn.Conv2d(inputs, outputs, size, stride, **settings)


def norm(channels: int, **place: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, channels_last=True, **place)


class ResNet9(nn.Module):
    """The course's network for images of 32 x 32 pixels, (n, 3, 32, 32) -> (n, classes)."""

    def __init__(self, num_classes: int = 10, **place: Any) -> None:
        def part(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
            first = conv(inputs, outputs, size, stride, **place)
            return nn.Sequential(first, norm(outputs, **place), nn.ReLU())

        def residual(width: int) -> nn.Module:
            return nn.Residual(nn.Sequential(part(width, width, 3, 1), part(width, width, 3, 1)))

        self.layers = nn.Sequential(
            part(3, 16, 7, 4), part(16, 32, 3, 2), residual(32),
            part(32, 64, 3, 2), part(64, 128, 3, 2), residual(128),
            nn.Flatten(), nn.Linear(128, 128, **place), nn.ReLU(),
            nn.Linear(128, num_classes, **place),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(to_last(x))


class BasicBlock(nn.Module):
    """y = relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), of 3 x 3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, **place: Any) -> None:
        self.conv1 = conv(inputs, width, 3, stride, bias=False, **place)
        self.bn1 = norm(width, **place)
        self.conv2 = conv(width, width, 3, bias=False, **place)
        self.bn2 = norm(width, **place)
        self.downsample = shortcut(inputs, width, stride, **place)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """BasicBlock of a 1 x 1, a 3 x 3 with the stride, and a 1 x 1 convolution to 4 widths."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, **place: Any) -> None:
        self.conv1 = conv(inputs, width, 1, bias=False, **place)
        self.bn1 = norm(width, **place)
        self.conv2 = conv(width, width, 3, stride, bias=False, **place)
        self.bn2 = norm(width, **place)
        self.conv3 = conv(width, 4 * width, 1, bias=False, **place)
        self.bn3 = norm(4 * width, **place)
        self.downsample = shortcut(inputs, 4 * width, stride, **place)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        return relu(self.bn3(self.conv3(y)) + self.downsample(x))


def shortcut(inputs: int, outputs: int, stride: int, **place: Any) -> nn.Module:
    """x itself where that has the shape."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    first = conv(inputs, outputs, 1, stride, bias=False, **place)
    return nn.Sequential(first, norm(outputs, **place))


class ResNet(nn.Module):
    """(n, channels, height, width) -> (n, classes) through four stages of `depths` blocks.

    block: BasicBlock or Bottleneck. stem: "imagenet", a 7 x 7 convolution and a max pooling, both
    with stride 2, or "cifar", a 3 x 3 convolution, for small images. width: channels of the stem
    and the first stage; it doubles from stage to stage. device and dtype by keyword.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, ...],
        num_classes: int = 1000,
        stem: str = "imagenet",
        in_channels: int = 3,
        width: int = 64,
        **place: Any,
    ) -> None:
        known = stem in ("imagenet", "cifar")
        expect(known, f"resnet: expected stem 'imagenet' or 'cifar'; received {stem!r}")
        self.stem = stem
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = conv(in_channels, width, size, stride, bias=False, **place)
        self.bn1 = norm(width, **place)
        inputs, stages = width, []
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                blocks.append(block(inputs, width << stage, stride, **place))
                inputs = (width << stage) * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(inputs, num_classes, **place)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(to_last(x))))
        if self.stem == "imagenet":
            x = max_pool2d(x, 3, 2, 1, channels_last=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((1, 2)))

    @classmethod
    def from_pretrained(cls, path: AnyPath, **place: Any) -> Self:
        """The network in a safetensors file of torchvision's names and order of axes, or in the
        model.safetensors of a folder: kind of block, depths, stem and classes are read off it.
        FileError where the file, or what is in it, is another one."""
        path = Path(path)
        path = path / "model.safetensors" if path.is_dir() else path
        state, _ = load_tensors(path)
        with reading(path, "a ResNet with torchvision's names"):
            first, classes = state["conv1.weight"].shape, len(state["fc.weight"])
            block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
            stem = "imagenet" if first[2:] == (7, 7) else "cifar"
            depths = tuple(
                next(i for i in count() if f"layer{stage}.{i}.conv1.weight" not in state)
                for stage in (1, 2, 3, 4)
            )
            model = cls(block, depths, classes, stem, first[1], first[0], **place)
            model.load_state_dict(nn.from_torch(model, state))
        return model


def resnet18(num_classes: int = 1000, stem: str = "imagenet", **settings: Any) -> ResNet:
    """ResNet-18: 2 basic blocks in each stage."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, stem, **settings)


def resnet50(num_classes: int = 1000, stem: str = "imagenet", **settings: Any) -> ResNet:
    """ResNet-50: 3, 4, 6 and 3 bottleneck blocks."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, stem, **settings)
