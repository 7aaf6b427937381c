"""Moving a tensor between devices."""

from __future__ import annotations

from needle.array.ndarray import NDArray
from needle.array.spec import Spec
from needle.autograd import MODE, Tensor, TensorOp, primitive
from needle.backend.device import Device, find_device
from needle.errors import expect
from needle.ops.elementwise import rule


@primitive
class ToDevice(TensorOp):
    """y = x on another device;  dx = dy on x's device"""

    moves = True
    device: str

    def infer(self, x: Spec) -> Spec:
        return x

    def compute(self, x: NDArray) -> NDArray:
        return x

    gradient = rule(lambda dy, y, x: to_device(dy, x.device))


def to_device(x: Tensor, device: Device | str) -> Tensor:
    """x on a device (x itself where it is there already); computed at once, in lazy mode too."""
    device = find_device(device) if isinstance(device, str) else device
    if x.device is device:
        return x
    missing = f"to: expected a device that this machine has; received {device}; use ndl.cpu()"
    expect(device.enabled(), missing)
    requires_grad = x.requires_grad and MODE.grad
    op, inputs = (ToDevice(device.name), (x,)) if requires_grad else (None, ())
    return Tensor._new(op, inputs, x.realize_cached_data().to(device), requires_grad)
