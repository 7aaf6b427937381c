"""What fuses: the number of kernels of programs that users write. A kernel is what all threads run
between two barriers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle import nn, ops
from needle.array.spec import Spec
from needle.autograd import Tensor, compute_gradient_of_variables
from needle.compiler import compile as passes
from needle.compiler import graph
from needle.compiler.loops import Contraction, Nest, Scatter, show
from needle.ops.composite import placeholder, tracing

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)


def inputs_of(*shapes: Any) -> list[Tensor]:
    """Placeholders: of float32 and differentiated, or of int64 for shapes given as lists."""
    return [
        placeholder(Spec(tuple(shape), I64 if isinstance(shape, list) else F32), True)
        for shape in shapes
    ]


def lowered(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> passes.Lowered:
    return passes.lower(graph.trace(inputs, outputs))


def forward(function: Callable[..., Any], *shapes: Any) -> passes.Lowered:
    with tracing():
        xs = inputs_of(*shapes)
        return lowered([function(*xs)], xs)


def backward(function: Callable[..., Any], *shapes: Any, both: bool = False) -> passes.Lowered:
    """The gradients alone, for a given gradient of the output; `both`: and the output."""
    with tracing():
        xs = inputs_of(*shapes)
        y = function(*xs)
        dy = placeholder(y.spec)
        compute_gradient_of_variables(y, dy)
        grads = [x.grad for x in xs if x.requires_grad]
        return lowered([y, *grads] if both else grads, [*xs, dy])


def count(found: passes.Lowered) -> int:
    return len(found.schedule.kernels)


def nests(found: passes.Lowered) -> list[Any]:
    return [nest for kernel in found.schedule.kernels for nest in kernel]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (16,), weight, bias)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, weight, bias, training=True)


ROW, VECTOR = (8, 16), (16,)


def chain(x: Tensor, v: Tensor) -> Tensor:
    return ops.exp((x.transpose() * 2.0).reshape((4, 4, 8))[1:3] + v.reshape((1, 1, 8))).relu()


PINNED: dict[str, tuple[passes.Lowered, int]] = {
    "a chain with broadcasts and views": (forward(chain, ROW, (8,)), 1),
    "softmax": (forward(ops.softmax, ROW), 1),
    "softmax, backward": (backward(ops.softmax, ROW), 1),
    "layer norm": (forward(layer_norm, ROW, VECTOR, VECTOR), 1),
    "layer norm, backward": (backward(layer_norm, ROW, VECTOR, VECTOR), 2),
    "batch norm": (forward(batch_norm, ROW, VECTOR, VECTOR), 1),
    "batch norm, backward": (backward(batch_norm, ROW, VECTOR, VECTOR), 1),
    "cross-entropy, both": (backward(nn.functional.cross_entropy, ROW, [8], both=True), 2),
    "relu(x @ w + b)": (forward(lambda x, w, b: ops.relu(x @ w + b), ROW, (16, 4), (4,)), 1),
    "residual": (forward(lambda x, w: ops.relu(x @ w) + x, ROW, (16, 16)), 1),
    "a large sum": (forward(lambda x: (x * x).sum(), (1000, 1000)), 2),
}


@pytest.mark.parametrize("name", PINNED)
def test_kernel_counts(name: str) -> None:
    found, expected = PINNED[name]
    text = "\n".join(show(nest) for nest in nests(found))
    assert count(found) == expected, f"{count(found)} kernels:\n{text}"


def test_an_epilogue_takes_bias_activation_and_residual() -> None:
    found = forward(lambda x, w, b: ops.relu(x @ w + b) + x, ROW, (16, 16), (16,))
    [nest] = nests(found)
    assert isinstance(nest, Contraction)
    assert found.plan.size == 0


@pytest.mark.parametrize(("clip", "kernels"), [(False, 2), (True, 3)])
def test_the_update_of_a_whole_model(clip: bool, kernels: int) -> None:
    """One kernel for what all parameters share, one for all of them; clipping adds the norms."""
    params = [nn.Parameter(ndl.randn(*shape)) for shape in ((4, 8), (8,), (8, 2), (2,), (2, 3, 4))]
    optimizer = ndl.optim.Adam(params, weight_decay=0.01)
    for p in params:
        p.grad = ndl.randn(*p.shape)

    @ndl.jit
    def step() -> None:
        if clip:
            optimizer.clip_grad_norm(1.0)
        optimizer.step()

    step()
    [(_, [program])] = step.programs()
    found = passes.lower(program.source, program.donated)
    assert count(found) == kernels, "\n".join(show(nest) for nest in nests(found))


def test_dropout_masks_stay_in_one_nest() -> None:
    def drop(x: Tensor, state: Tensor) -> Tensor:
        mask = ops.RandomUniform(x.shape, F32)(state) <= 0.9
        return ops.exp(ops.normalize.masked(x, mask, 0.1))

    found = backward(drop, (64, 64), [2], both=True)
    assert found.plan.size == 0
    assert all(store.value.dtype == F32 for nest in nests(found) for store in nest.stores)


def test_dropout_masks_of_several_nests_are_drawn_once() -> None:
    """And kept as bools: drawing takes some sixty operations a number."""

    def layers(x: Tensor, w: Tensor, state: Tensor) -> Tensor:
        y = x @ w
        mask = ops.RandomUniform(y.shape, F32)(state) <= 0.9
        return ops.normalize.masked(y, mask, 0.1) @ w

    found = backward(layers, (64, 32), (32, 32), [2], both=True)
    state = found.layout.buffer(found.graph.inputs[2])
    (drawing,) = [nest for nest in nests(found) if state in nest.reads()]
    assert [store.value.dtype for store in drawing.stores] == [np.dtype(bool)]


def test_a_gather_and_its_gradient() -> None:
    found = backward(lambda x, i: ops.take(x, i), ROW, [3, 4], both=True)
    assert [type(nest) for nest in nests(found)] == [Nest, Scatter]
    assert len(found.layout.checks) == 2


def test_transposed_operands_are_strided_views() -> None:
    found = backward(lambda x, w: x @ w, (8, 16), (16, 4))
    assert [type(nest) for nest in nests(found)] == [Contraction, Contraction]
    assert {(nest.a.outer, nest.a.inner) for nest in nests(found)} == {(4, 1), (1, 16)}
    assert found.plan.size == 0


def test_many_parts_are_written_where_they_belong() -> None:
    def joined(x: Tensor) -> Tensor:
        return ops.concatenate([ops.exp(x), x * 2.0, x, x + 1.0, -x], 1)

    found = forward(joined, (4, 3))
    assert count(found) == 1
    assert {store.access.buffer.size for nest in nests(found) for store in nest.stores} == {60}


# Images


def first(x: Tensor) -> Tensor:
    return ops.permute(x, (0, 3, 1, 2))


def last(x: Tensor) -> Tensor:
    return ops.permute(x, (0, 2, 3, 1))


def block(x: Tensor, w: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """Two layers and a residual, with channels first outside of the convolutions."""
    y = ops.relu(first(ops.conv(last(x), w) + bias) * 0.5)
    return ops.relu(first(ops.conv(last(y), other)) + y)


IMAGE = ((2, 3, 6, 5), (3, 3, 3, 8), (8,), (3, 3, 8, 8))


def test_convolutions_pack_windows_of_the_padded_image() -> None:
    for found in (forward(block, *IMAGE), backward(block, *IMAGE)):
        contractions = [nest for nest in nests(found) if isinstance(nest, Contraction)]
        assert all(nest.a.digits for nest in contractions)
        largest = max(buffer.size for buffer in found.plan.offsets)
        assert largest <= 2 * 8 * 7 * 8, "windows were copied"


def test_images_are_computed_channels_last() -> None:
    """Only the image itself is read with strides, and the result written so."""
    found = forward(block, *IMAGE)
    written = [nest for nest in nests(found) if isinstance(nest, Nest)]
    assert len(written) == 2, "more than the padding of both layers"
    for nest in nests(found)[1:-1]:
        body = nest.epilogue if isinstance(nest, Contraction) else nest
        loads = [each.attr for each in body.expressions() if each.op == "load"]
        for access in [*loads, *(store.access for store in body.stores)]:
            assert access.stride(body.inner_axis) in (0, 1), show(nest)


def test_padding_of_a_row_is_one_loop() -> None:
    (nest,) = nests(forward(lambda x: ops.pad(x, [(0, 0), (1, 2), (2, 1), (0, 0)]), (2, 3, 4, 5)))
    assert (nest.outer, nest.inner) == ((2, 6), 7 * 5)


def test_short_rows_are_turned() -> None:
    (nest,) = nests(forward(last, (2, 3, 6, 40)))
    assert nest.inner == 6 * 40


@pytest.mark.parametrize(
    ("shape", "axes", "loops"),
    [
        ((256, 128), (0, 1), None),  # 512 bytes apart
        ((128, 256), (0, 1), (4, 8, 64)),
        ((32, 1024), (0, 1), (16, 2, 64)),
        ((40, 1024 + 8), (0, 1), None),
        ((3, 48, 2, 1024), (1, 3), (3, 16, 2, 3, 64)),
        ((16, 1024), (0, 1), None),  # no more than one vector
        ((1001, 1024), (0, 1), None),
    ],
)
def test_what_is_read_across_is_woven(
    shape: tuple[int, ...], axes: tuple[int, int], loops: tuple[int, ...] | None
) -> None:
    """In blocks, where rows a power of two apart would drive each other out of the cache."""

    def function(x: Tensor) -> Tensor:
        return ops.relu(ops.transpose(x, axes)) * 2.0

    (nest,) = nests(forward(function, shape))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = ndl.jit(function)(Tensor(x, requires_grad=False)).numpy()
    np.testing.assert_array_equal(found, np.maximum(np.swapaxes(x, *axes), 0) * 2)
    unwoven = nest.inner == shape[axes[0]]
    assert unwoven if loops is None else (nest.outer, nest.inner) == (loops, 16)


def test_one_number_for_a_row_is_not_read_across() -> None:
    (nest,) = nests(forward(lambda x, y: x * y.reshape((256, 1)), (256, 1024), (256,)))
    assert nest.inner == 1024


def test_taps_that_meet_padding_alone_are_left_out() -> None:
    (pad, nest) = nests(forward(ops.conv, (4, 2, 1, 8), (3, 3, 8, 16)))
    assert nest.k == 3 * 8, show(pad)


def whole_stores(found: passes.Lowered, size: int) -> int:
    """How many buffers of a size nests write."""
    written = {
        store.access.buffer.name
        for nest in nests(found)
        for store in (nest.epilogue if isinstance(nest, Contraction) else nest).stores
        if store.access.buffer.size == size
    }
    return len(written)


def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.relu(ops.BatchNorm(1e-5)(x, weight, bias))


def test_batch_norm_keeps_its_input_alone() -> None:
    """Centred and normalised values are computed again from it: sums of chunks, and of those, for
    mean and variance, then one nest with the activation."""
    shapes, size = ((8192, 16), (16,), (16,)), 8192 * 16
    found = forward(normalized, *shapes)
    assert count(found) == 5
    assert whole_stores(found, size) == 1
    assert whole_stores(backward(normalized, *shapes, both=True), size) <= 3  # y, relu's dx, dx


def test_an_activation_is_computed_as_it_is_padded() -> None:
    def padded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = ops.reshape(normalized(x, weight, bias), (2, 64, 64, 16))
        return ops.pad(y, [(0, 0), (1, 1), (1, 1), (0, 0)])

    found = backward(padded, (8192, 16), (16,), (16,), both=True)
    assert whole_stores(found, 2 * 66 * 66 * 16) == 1
    assert whole_stores(found, 8192 * 16) <= 2  # relu's dx and dx


@pytest.mark.parametrize("settings", [(2,), (3, 2, 1)])
def test_pooling_is_one_kernel_and_its_gradient_another(settings: tuple[int, ...]) -> None:
    shape = (2, 9, 8, 16)
    for pool in (ops.max_pool, ops.avg_pool):
        assert count(forward(lambda x, pool=pool: pool(x, *settings), shape)) == 1
        found = backward(lambda x, pool=pool: pool(x, *settings), shape, both=True)
        assert count(found) <= 2
    (nest,) = nests(forward(lambda x: ops.max_pool(x, 3, 2, 1), shape))
    for each in nest.expressions():  # one mask serves all channels
        assert each.op != "load" or each.args == () or nest.inner_axis not in each.args[0].axes
