"""The graph: what backward computes and keeps, lazy evaluation, users' ops, memory, threads."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from checks import (
    LAZY_MODES,
    assert_gradient,
    assert_lazy_is_eager,
    assert_same_bits,
    assert_second_order,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import needle as ndl
from needle import autograd, ops
from needle.autograd import Tensor, TensorTuple, find_topo_sort

EAGER_AND_LAZY = pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])


@contextmanager
def mode(lazy: bool) -> Iterator[None]:
    if not lazy:
        yield
        return
    with ndl.lazy():
        yield


@contextmanager
def without_collector() -> Iterator[None]:
    """Only reference counts free anything."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def numbers(*values: float, **options: Any) -> Tensor:
    return Tensor(np.array(values), **options)


# backward


@EAGER_AND_LAZY
def test_backward_overwrites(lazy: bool) -> None:
    x = numbers(1.0, 2.0)
    with mode(lazy):
        (x * 3).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [3, 3]
        (x * x).sum().backward()
        assert x.grad.tolist() == [2, 4]


def test_a_leaf_used_twice_gets_the_sum() -> None:
    x = numbers(2.0)
    (x * x + x * 3 + x.exp() * 0.0 + x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [8]


def test_both_operands_may_be_one_tensor() -> None:
    x = numbers(3.0)
    for y, slope in ((x + x, 2), (x - x, 0), (x * x, 6), (x / x, 0), (ndl.maximum(x, x), 1)):
        y.backward()
        assert x.grad is not None
        assert x.grad.item() == slope


@EAGER_AND_LAZY
def test_gradients_have_history(lazy: bool) -> None:
    """y = x^4: y' = 4 x^3, y'' = 12 x^2, y''' = 24 x, y'''' = 24."""
    x = numbers(2.0)
    with mode(lazy):
        y = x * x * x * x
        for expected in (32.0, 48.0, 48.0, 24.0):
            y.backward()
            assert x.grad is not None
            assert x.grad.item() == expected
            y = x.grad


def test_gradients_under_no_grad_have_none() -> None:
    x = numbers(2.0)
    y = x * x
    with ndl.no_grad():
        y.backward()
    assert x.grad is not None
    assert x.grad.item() == 4
    assert not x.grad.requires_grad


def test_out_grad_weighs_the_output_and_can_be_differentiated() -> None:
    x, w = numbers(1.0, 2.0), numbers(10.0, 20.0)
    (x * x).backward(w)
    assert x.grad is not None
    assert x.grad.tolist() == [20, 80]
    x.grad.sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [2, 4]


def test_out_grad_may_be_an_array_or_of_another_dtype() -> None:
    x = Tensor([1.0, 2.0])
    for w in (np.array([1.0, 2.0]), [1, 2], Tensor(np.array([1.0, 2.0]))):
        (x * 3).backward(w)
        assert x.grad is not None
        assert x.grad.dtype == "float32"
        assert x.grad.tolist() == [3, 6]


def test_backward_of_a_tensor_that_is_not_a_scalar_adds_its_elements() -> None:
    x = Tensor(np.ones((2, 3)))
    (x * 2).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2, 2, 2], [2, 2, 2]]


def test_a_leaf_is_its_own_gradients_end() -> None:
    x = numbers(1.0)
    x.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1]


def test_results_of_ops_hold_a_value_and_retain_grad_a_history() -> None:
    x = numbers(3.0)
    y = x * x
    (y * y).backward()
    assert y.grad is not None
    assert y.grad.item() == 18
    assert not y.grad.requires_grad
    kept = x * x
    kept.retain_grad()
    (kept * kept).backward()
    assert kept.grad is not None
    assert kept.grad.item() == 18
    assert kept.grad.requires_grad


def test_where_only_steps_lead_the_gradient_is_zero() -> None:
    """As a derivative that is 0 everywhere says; an older gradient does not stay."""
    x = numbers(1.5)
    (x * 2).backward()
    ndl.floor(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0]


def test_backward_refuses_what_has_no_history() -> None:
    for y in (
        Tensor([1.0], requires_grad=False),
        Tensor([1], dtype="int32"),
        Tensor([1.0]).detach() * 2,
    ):
        with pytest.raises(
            ValueError, match=r"^backward: expected a tensor with history; received one without"
        ):
            y.backward()


def test_backward_refuses_an_out_grad_of_another_shape() -> None:
    x = numbers(1.0, 2.0)
    with pytest.raises(
        ValueError, match=r"^backward: expected out_grad of shape \(2,\); received \(3,\)$"
    ):
        (x * 2).backward(np.ones(3))
    assert x.grad is None


def test_a_gradient_rule_that_raises_changes_no_gradient() -> None:
    class Broken(ndl.TensorOp):
        def compute(self, x: np.ndarray) -> np.ndarray:
            return x

    x, z = numbers(1.0), numbers(2.0)
    y = (Broken()(x) + z) * z
    z.grad = before = Tensor([7.0])
    with pytest.raises(
        NotImplementedError,
        match=r"^Broken: has no gradient; detach its input, or write `gradient`$",
    ):
        y.backward()
    assert x.grad is None
    assert z.grad is before
    assert autograd.MODE.backward_of is None


# Values without history


def test_data_and_detach_share_memory_and_drop_history() -> None:
    x = numbers(1.0, 2.0)
    for y in (x.data, x.detach(), (x * 1).detach()):
        assert y.is_leaf()
        assert not y.requires_grad
        assert y.inputs == ()
    assert np.shares_memory(x.data.numpy(), x.numpy())


@EAGER_AND_LAZY
def test_assigning_data_keeps_old_values_elsewhere(lazy: bool) -> None:
    """w.data = ... gives w new memory: who holds the old array keeps it."""
    w = numbers(1.0, 2.0)
    with mode(lazy):
        old = w.data
        w.data = w.data * 10
        assert old.tolist() == [1, 2]
        assert w.tolist() == [10, 20]
        assert w.requires_grad
        assert w.is_leaf()


def test_a_pending_value_reads_what_its_input_held_when_it_was_made() -> None:
    w = numbers(1.0)
    with ndl.lazy():
        y = w * 2
        w.data = numbers(5.0)
        assert y.item() == 2
        assert (w * 2).item() == 10


def test_updates_through_data_add_nothing_to_the_graph() -> None:
    w = numbers(1.0)
    gc.collect()  # what other tests left
    before = ndl.memory.live_values()
    for _ in range(50):
        w.data = w.data + w.data * -0.1
    assert ndl.memory.live_values() == before


def test_assigning_data_of_another_dtype_is_refused() -> None:
    w = Tensor([1.0])
    with pytest.raises(
        TypeError, match=r"^Tensor.data: expected float32; received float64; convert with .astype"
    ):
        w.data = numbers(1.0)
    assert w.tolist() == [1]
    w.data = [3.0]
    assert w.tolist() == [3]
    assert w.dtype == "float32"


@EAGER_AND_LAZY
def test_detach_stops_gradients(lazy: bool) -> None:
    x = numbers(3.0)
    with mode(lazy):
        y = x * 2
        stopped = y.detach()
        assert not stopped.requires_grad
        (stopped * x).backward()
        assert x.grad is not None
        assert x.grad.item() == 6


@EAGER_AND_LAZY
def test_ops_that_need_no_gradient_keep_no_inputs(lazy: bool) -> None:
    x = numbers(1.0, requires_grad=False)
    with mode(lazy):
        y = x * 2 + x - x / 3
    assert y.item() == pytest.approx(8 / 3)
    assert y.is_leaf()
    assert y.inputs == ()
    assert y.op is None


def test_no_grad_and_enable_grad_nest_and_end_with_errors() -> None:
    x = numbers(1.0)
    with ndl.no_grad():
        assert not (x * 2).requires_grad
        with ndl.enable_grad():
            assert (x * 2).requires_grad
        assert not (x * 2).requires_grad
    with pytest.raises(KeyError), ndl.no_grad():
        raise KeyError
    assert (x * 2).requires_grad


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_integers_and_bools_never_require_a_gradient(dtype: str) -> None:
    assert not Tensor([1], dtype=dtype, requires_grad=True).requires_grad
    assert not (Tensor([1.5]) > 1).requires_grad
    assert not Tensor([1.5]).astype(dtype).requires_grad
    assert not Tensor.make_const(np.array([1], dtype), requires_grad=True).requires_grad


# The shape of the graph


def test_the_topological_order_is_post_order_depth_first() -> None:
    """As the course's: inputs from left to right, each node after its inputs, once."""
    a, b = numbers(1.0), numbers(2.0)
    c = a * b
    d = c + a
    e = d * c
    assert find_topo_sort([e]) == [a, b, c, d, e]
    assert find_topo_sort([d, e]) == [a, b, c, d, e]
    assert find_topo_sort([b, e]) == [b, a, c, d, e]
    assert find_topo_sort([]) == []


def test_subtraction_is_an_addition_of_a_negation() -> None:
    a, b = numbers(1.0, 2.0), numbers(3.0, 5.0)
    y = a - b
    assert isinstance(y.op, ops.EWiseAdd)
    assert y.inputs[0] is a
    negated = y.inputs[1]
    assert isinstance(negated.op, ops.Negate)
    assert negated.inputs == (b,)
    assert negated.cached_data is None
    assert negated.tolist() == [-3, -5]


def test_an_operation_with_a_scalar_is_one_node() -> None:
    x = numbers(1.0, 2.0)
    for y, kind in (
        (x + 1, ops.AddScalar),
        (1 + x, ops.AddScalar),
        (x - 1, ops.AddScalar),
        (x * 2, ops.MulScalar),
        (x / 2, ops.DivScalar),
        (x**2, ops.PowerScalar),
        (x + np.float64(1), ops.AddScalar),
        (ndl.divide_scalar(x, np.random.randn(1)), ops.DivScalar),
    ):
        assert type(y.op) is kind
        assert y.inputs == (x,)


def test_the_courses_op_classes_are_callable() -> None:
    a, b = Tensor(np.array([[1.0, 2.0], [3.0, 4.0]])), Tensor(np.array([[2.0, 2.0], [1.0, 1.0]]))
    x, y = a.numpy(), b.numpy()
    for found, expected in (
        (ops.EWiseAdd()(a, b), x + y),
        (ops.AddScalar(2.0)(a), x + 2),
        (ops.EWiseMul()(a, b), x * y),
        (ops.MulScalar(3)(a), x * 3),
        (ops.EWisePow()(a, b), x**y),
        (ops.PowerScalar(scalar=2)(a), x**2),
        (ops.EWiseDiv()(a, b), x / y),
        (ops.DivScalar(scalar=4)(a), x / 4),
        (ops.Transpose()(a), x.T),
        (ops.Transpose(axes=(0, 1))(a), x.T),
        (ops.Reshape((4,))(a), x.reshape(4)),
        (ops.Reshape([1, 4])(a), x.reshape(1, 4)),
        (ops.BroadcastTo((3, 2, 2))(a), np.broadcast_to(x, (3, 2, 2))),
        (ops.Summation()(a), x.sum()),
        (ops.Summation(axes=(0,))(a), x.sum(0)),
        (ops.Summation(1)(a), x.sum(1)),
        (ops.MatMul()(a, b), x @ y),
        (ops.Negate()(a), -x),
        (ops.Log()(a), np.log(x)),
        (ops.Exp()(a), np.exp(x)),
        (ops.ReLU()(a), x),
        (ops.Tanh()(a), np.tanh(x)),
        (ops.LogSumExp((1,))(a), np.log(np.exp(x).sum(1))),
        (ops.LogSoftmax()(a), x - np.log(np.exp(x).sum(1, keepdims=True))),
        (ops.Stack(1)([a, b]), np.stack([x, y], 1)),
        (ops.Split(0)(a)[1], x[1]),
        (ops.Flip((1,))(a), x[:, ::-1]),
        (ops.Dilate((0,), 1)(a), np.array([x[0], [0, 0], x[1], [0, 0]])),
        (ops.UnDilate((0,), 1)(a), x[:1]),
    ):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    op = ops.EWiseMul()
    node = op(a, b)
    grads = op.gradient_as_tuple(Tensor(np.ones((2, 2))), node)
    assert [grad.tolist() for grad in grads if grad is not None] == [y.tolist(), x.tolist()]
    assert op.gradient_as_tuple is not None
    assert ops.Exp().gradient_as_tuple(Tensor(np.ones((2, 2))), ops.Exp()(a))[0] is not None
    np.testing.assert_array_equal(op.compute(x, y), x * y)


def test_ops_with_equal_fields_are_one_object() -> None:
    assert ops.Exp() is ops.Exp()
    assert ops.AddScalar(1.0) is ops.AddScalar(scalar=1.0)
    scalars = [0.0, -0.0, 0, False, 1, 1.0, True]
    assert len({ops.AddScalar(scalar) for scalar in scalars}) == len(scalars)
    assert ops.AddScalar(float("nan")) is ops.AddScalar(-float("nan"))
    assert pickle.loads(pickle.dumps(ops.Summation((1,)))) is ops.Summation((1,))


def test_op_fields_are_checked_and_cannot_change() -> None:
    with pytest.raises(
        TypeError, match=r"^AddScalar: expected fields \(scalar\); received \(1, 2\)$"
    ):
        ops.AddScalar(1, 2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^AddScalar: expected fields \(scalar\); received \(\)$"):
        ops.AddScalar()  # type: ignore[call-arg]
    with pytest.raises(
        AttributeError, match=r"^AddScalar: ops are shared and cannot be changed: scalar$"
    ):
        ops.AddScalar(1.0).scalar = 2.0  # type: ignore[misc]


def test_compute_gradient_of_variables_is_what_backward_calls() -> None:
    x = numbers(3.0)
    y = x * x
    autograd.compute_gradient_of_variables(y, numbers(2.0))
    assert x.grad is not None
    assert x.grad.item() == 12


# Lazy evaluation


@pytest.mark.parametrize("switch", LAZY_MODES)
def test_lazy_ops_wait_until_somebody_asks(switch: str) -> None:
    computed = []

    class Watched(ndl.TensorOp):
        def infer(self, x: Any) -> Any:
            return x

        def compute(self, x: np.ndarray) -> np.ndarray:
            computed.append(len(computed))
            return x + 1

    x = numbers(1.0)
    with LAZY_MODES[switch]():
        y = Watched()(Watched()(x))
        assert y.shape == (1,)
        assert y.dtype == "float64"
        assert str(y.device) == "cpu()"
        assert computed == []
        assert y.cached_data is None
    assert y.realize_cached_data().tolist() == [3]
    assert computed == [0, 1]
    assert y.numpy().tolist() == [3]
    assert computed == [0, 1]


def test_errors_of_shapes_come_at_the_call_in_lazy_mode_too() -> None:
    with ndl.lazy():
        x, y = numbers(1.0, 2.0) * 1, numbers(1.0, 2.0, 3.0) * 1
        with pytest.raises(ValueError, match=r"^add: expected shapes that broadcast together"):
            x + y
        with pytest.raises(ValueError, match=r"^matmul: inner dimensions differ"):
            x @ y


def test_backward_in_lazy_mode_computes_nothing_that_nobody_reads() -> None:
    x, w = numbers(1.0, 2.0), numbers(3.0, 4.0)
    with ndl.lazy():
        y = (x * w).sum()
        y.backward()
        assert x.grad is not None
        assert w.grad is not None
        assert y.cached_data is None
        assert x.grad.cached_data is None
    assert x.grad.tolist() == [3, 4]
    assert w.grad.cached_data is None


def test_lazy_mode_is_a_block_and_ends_with_errors() -> None:
    with pytest.raises(KeyError), ndl.lazy():
        raise KeyError
    assert (numbers(1.0) * 2).cached_data is not None


# Depth


def chain(x: Tensor, length: int) -> Tensor:
    for _ in range(length):
        x = x + 0.5
    return x


@EAGER_AND_LAZY
def test_a_chain_of_100000_ops_differentiates_and_is_freed(lazy: bool) -> None:
    length = 100_000
    gc.collect()
    x = numbers(1.0)
    live = ndl.memory.live_values()
    with mode(lazy):
        y = chain(x, length)
        assert len(find_topo_sort([y])) == length + 1
        y.backward()
    assert y.item() == 1 + length / 2
    assert x.grad is not None
    assert x.grad.item() == 1
    del y
    x.grad = None
    assert ndl.memory.live_values() == live


def test_a_deep_graph_that_is_wide_too() -> None:
    """Fibonacci: y[n] = y[n - 1] + y[n - 2], every node with two consumers."""
    x = numbers(1.0)
    a, b = x, x
    for _ in range(70):
        a, b = b, a + b
    b.backward()
    assert x.grad is not None
    assert x.grad.item() == b.item() == 498454011879264


# Tuples


@EAGER_AND_LAZY
def test_tuples_and_their_gradients(lazy: bool) -> None:
    x = Tensor(np.arange(6.0).reshape(3, 2))
    with mode(lazy):
        parts = ndl.split(x, 0)
        assert isinstance(parts, TensorTuple)
        assert len(parts) == 3
        assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
        assert parts[-1].tolist() == [4, 5]
        assert [each.tolist() for each in parts[1:]] == [[2, 3], [4, 5]]
        (parts[0] * 2 + parts[0] * parts[2]).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[6, 7], [0, 0], [0, 1]]
    with pytest.raises(IndexError, match=r"^TensorTuple: expected an index below 3; received 3$"):
        parts[3]


def test_tuples_make_add_detach_and_print() -> None:
    a, b = numbers(1.0), numbers(2.0)
    pair = ops.make_tuple(a, b)
    total = pair + pair
    assert [each.tolist() for each in total.numpy()] == [[2], [4]]
    (total[0] * total[1]).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.item(), b.grad.item()) == (8, 4)
    assert not pair.detach()[0].requires_grad
    assert repr(pair).startswith("TensorTuple(Tensor([1.], dtype=float64")
    with pytest.raises(ValueError, match="^add: expected two TensorTuples of one length"):
        pair + ops.make_tuple(a)
    with pytest.raises(
        TypeError, match="^expected a Tensor; received a TensorTuple; take one of its items$"
    ):
        ndl.exp(pair)


def test_an_item_whose_gradient_is_differentiated_again() -> None:
    x = Tensor(np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert_gradient(
        lambda x: ndl.split(x, 0)[0] * ndl.split(x, 0)[1],
        lambda x: x[0] * x[1],
        [x.numpy()],
        (0,),
        np.random.default_rng(0),
    )
    assert_second_order(
        lambda x: ndl.split(x, 0)[0] ** 2 * ndl.split(x, 0)[1],
        [x.numpy()],
        (0,),
        np.random.default_rng(0),
    )


# A user's own ops, as the course teaches: compute and gradient


class Cube(ndl.TensorOp):
    def compute(self, a: np.ndarray) -> np.ndarray:
        return a**3

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        a = node.inputs[0]
        return out_grad * 3 * a * a


class ScaledSum(ndl.TensorOp):
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def compute(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.scale * (a + b)

    def gradient(self, out_grad: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * out_grad, self.scale * out_grad


class SumAndProduct(ndl.TensorTupleOp):
    def compute(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return a + b, a * b

    def gradient(self, out_grad: TensorTuple, node: Any) -> tuple[Tensor, Tensor]:
        a, b = node.inputs
        dsum, dproduct = out_grad
        return dsum + dproduct * b, dsum + dproduct * a


class AddTuple(ndl.TensorOp):
    """An op that takes a TensorTuple."""

    def compute(self, *arrays: np.ndarray) -> np.ndarray:
        return sum(arrays[1:], arrays[0])

    def gradient(self, out_grad: Tensor, node: Any) -> Any:
        return ops.make_tuple(*(out_grad for _ in node.inputs[0]))


USERS: dict[str, tuple[Any, Any, int]] = {
    "one input": (Cube(), lambda a: a**3, 1),
    "two inputs": (ScaledSum(2.5), lambda a, b: 2.5 * (a + b), 2),
    "a tuple out": (SumAndProduct(), lambda a, b: (a + b, a * b), 2),
    "one item of a tuple": (lambda a, b: SumAndProduct()(a, b)[1], lambda a, b: a * b, 2),
    "a tuple in": (lambda a, b: AddTuple()(SumAndProduct()(a, b)), lambda a, b: a + b + a * b, 2),
    "a tuple made of tensors in": (
        lambda a, b: AddTuple()(ops.make_tuple(a, b)),
        lambda a, b: a + b,
        2,
    ),
}


@pytest.mark.parametrize("case", USERS)
def test_users_ops_work_like_built_in_ones(case: str, rng: np.random.Generator) -> None:
    function, reference, count = USERS[case]
    arrays = [rng.uniform(0.5, 2.0, (2, 3)) for _ in range(count)]
    wanted = tuple(range(count))
    assert_gradient(function, reference, arrays, wanted, rng)
    assert_second_order(function, arrays, wanted, rng)
    for switch in LAZY_MODES.values():
        assert_lazy_is_eager(function, arrays, wanted, switch)
    assert_gradient(function, reference, arrays, wanted, rng, ndl.cpu_numpy())


def test_a_users_op_may_return_a_list_of_gradients_a_scalar_or_an_ndarray() -> None:
    class Mean(ndl.TensorOp):
        def compute(self, a: np.ndarray) -> Any:
            return a.mean()

        def gradient(self, out_grad: Tensor, node: Tensor) -> list[Tensor]:
            return [ndl.broadcast_to(out_grad / 3, (3,))]

    class Doubled(ndl.TensorOp):
        def compute(self, a: np.ndarray) -> Any:
            return ndl.NDArray(a) * 2

    x = numbers(1.0, 2.0, 6.0)
    y = Mean()(x)
    assert y.item() == 3
    y.backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([1 / 3] * 3)
    assert Doubled()(x.detach()).tolist() == [2, 4, 12]


def test_a_users_op_with_a_pole_at_zero_is_inferred_without_a_warning() -> None:
    class Inverse(ndl.TensorOp):
        def compute(self, a: np.ndarray) -> np.ndarray:
            return 1 / a

        def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
            return -out_grad * node * node

    x = numbers(2.0)
    with ndl.lazy():
        y = Inverse()(x)
        assert y.shape == (1,)
        y.backward()
    assert x.grad is not None
    assert x.grad.item() == -0.25


def test_an_op_without_compute_or_a_call_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"^Half: compute is not written$"):
        type("Half", (ndl.TensorOp,), {})()(numbers(1.0))
    with pytest.raises(NotImplementedError, match=r"^Neither: subclass TensorOp or TensorTupleOp$"):
        type("Neither", (ndl.Op,), {})()(numbers(1.0))


# Memory


def train_step(w: Tensor, x: np.ndarray) -> list[weakref.ref[Tensor]]:
    """Forward, backward, update and reset of one step; its values, weakly held."""
    h = ndl.relu(Tensor(x, requires_grad=False) @ w)
    loss = (h * h).sum() + ndl.logsumexp(h) + ndl.split(h, 0)[0].sum()
    loss.backward()
    assert w.grad is not None
    w.data = w.data - w.grad.data * 0.01
    held = [weakref.ref(each) for each in (h, loss, w.grad, h.inputs[0])]
    w.grad = None
    return held


@EAGER_AND_LAZY
def test_nothing_of_a_step_outlives_it(lazy: bool, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 3))
    w = Tensor(rng.standard_normal((3, 2)))
    with without_collector(), mode(lazy):
        train_step(w, x)
        w.numpy()
        values, live = ndl.memory.live_values(), ndl.memory.live()
        for _ in range(20):
            held = train_step(w, x)
            w.numpy()
            assert [each() for each in held] == [None] * 4
        assert ndl.memory.live_values() == values
        assert ndl.memory.live() == live


def test_backward_alone_leaves_no_cycles() -> None:
    with without_collector():
        before = ndl.memory.live_values()
        x = numbers(1.0, 2.0)
        y = (x * x).sum()
        y.backward()
        x.grad = None
        del x, y
        assert ndl.memory.live_values() == before


def test_the_counter_counts_live_values() -> None:
    before = autograd.TENSOR_COUNTER
    x = numbers(1.0)
    y = x.detach() * 2
    assert autograd.TENSOR_COUNTER == before + 2
    del x, y
    assert autograd.TENSOR_COUNTER == before
    with pytest.raises(TypeError):
        Tensor(object())
    assert autograd.TENSOR_COUNTER == before


def test_a_program_ends_without_a_word() -> None:
    """Tensors that live until the interpreter ends, a deep chain among them, are freed quietly."""
    program = """
import needle as ndl
x = ndl.Tensor([1.0])
y = x
for _ in range(50_000):
    y = y * 1.0
y.backward()
z = ndl.ops.make_tuple(x, y)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Copies


def test_leaves_copy_and_pickle_and_results_refuse_deepcopy() -> None:
    x = Tensor(np.array([1.0, 2.0]), device=ndl.cpu_numpy())
    for y in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), pickle.loads(pickle.dumps(x * 1))):
        assert_same_bits(y, x)
        assert y.device is x.device
        assert y.requires_grad
        assert y.is_leaf()
        assert not np.shares_memory(y.numpy(), x.numpy())
    with pytest.raises(
        ValueError, match=r"^deepcopy: expected a leaf tensor; received one with history"
    ):
        copy.deepcopy(x * 1)


def test_a_transposed_leaf_pickles() -> None:
    x = Tensor(np.arange(6.0).reshape(2, 3)).T.detach()
    assert_same_bits(pickle.loads(pickle.dumps(x)), x)


# Threads


def test_modes_are_each_threads_own() -> None:
    x = numbers(1.0)
    inside, seen = threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    def other() -> None:
        inside.wait()
        y = x * 2
        found["grad"], found["data"] = y.requires_grad, y.cached_data is not None
        y.backward()
        seen.set()

    thread = threading.Thread(target=other)
    thread.start()
    with ndl.no_grad(), ndl.lazy():
        inside.set()
        assert seen.wait(timeout=60)
        y = x * 2
        assert not y.requires_grad
        assert y.cached_data is None
    thread.join()
    assert found == {"grad": True, "data": True}


def test_threads_that_train_at_once_do_not_disturb_each_other(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 3))
    starts = [rng.standard_normal((3, 2)) for _ in range(4)]

    def train(start: np.ndarray, lazy: bool) -> np.ndarray:
        w = Tensor(start)
        for _ in range(10):
            with mode(lazy):
                train_step(w, x)
        return w.numpy()

    expected = [train(start, False) for start in starts]
    before = ndl.memory.live_values()
    found: list[Any] = [None] * 4

    def work(place: int) -> None:
        found[place] = train(starts[place], place % 2 == 1)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y, wanted in zip(found, expected, strict=True):
        assert_same_bits(y, wanted)
    assert ndl.memory.live_values() == before


# A Tensor as a Python object


def test_a_tensor_as_a_number_a_sequence_and_text() -> None:
    x = Tensor(np.arange(6.0).reshape(2, 3))
    assert len(x) == 2
    assert [row.tolist() for row in x] == [[0, 1, 2], [3, 4, 5]]
    assert (x.ndim, x.size, x.shape, x.T.shape) == (2, 6, (2, 3), (3, 2))
    assert x[1, 2].item() == float(x[1, 2]) == int(x[1, 2]) == 5
    assert bool(x[0, 1]) is True
    assert bool(Tensor([0.0])) is False
    assert [10, 20, 30][Tensor(1, dtype="int64")] == 20
    assert np.asarray(x).tolist() == x.tolist()
    assert repr(x[0]) == "Tensor([0., 1., 2.], dtype=float64, device=cpu(), requires_grad=True)"
    assert str(Tensor([1], dtype="int8")) == "Tensor([1], dtype=int8, device=cpu())"
    assert x == x  # noqa: PLR0124 - identity: tensors have no elementwise ==
    assert x != Tensor(x.numpy())
    assert len({x, x}) == 1


def test_operators_with_arrays_and_reflected() -> None:
    x = numbers(1.0, 4.0)
    a = np.array([2.0, 3.0])
    for found, expected in (
        (a + x, [3, 7]),
        (a - x, [1, -1]),
        (a * x, [2, 12]),
        (a / x, [2, 0.75]),
        (a**x, [2, 81]),
        (a % x, [0, 3]),
        (a // x, [2, 0]),
        (a @ x, 14),
        (2 - x, [1, -2]),
        (8 / x, [8, 2]),
        (2**x, [2, 16]),
        (7 % x, [0, 3]),
        (7 // x, [7, 1]),
        (np.float64(2) * x, [2, 8]),
        ([1, 2] + x, [2, 6]),
        (-x, [-1, -4]),
        (abs(-x), [1, 4]),
        (x.matmul(x), 17),
    ):
        assert isinstance(found, Tensor)
        assert found.tolist() == expected
    assert (x < 2).tolist() == (2 > x).tolist() == [True, False]
    assert (x >= a).tolist() == [False, True]
    assert ((x > 0) & ~(x > 2)).tolist() == ((x > 2) ^ (x > 0)).tolist() == [True, False]
    assert ((x > 2) | (x < 2)).tolist() == [True, True]


def test_methods_are_the_functions() -> None:
    x = Tensor(np.array([[1.0, 4.0], [0.25, 9.0]]))
    for found, expected in (
        (x.sum(0), ndl.summation(x, 0)),
        (x.sum(axis=1, keepdims=True), ndl.summation(x, 1, keepdims=True)),
        (x.mean(0), ndl.mean(x, 0)),
        (x.var(1, correction=1), ndl.var(x, 1, correction=1)),
        (x.std(), ndl.std(x)),
        (x.max(0), ndl.max(x, 0)),
        (x.min(), ndl.min(x)),
        (x.prod(1), ndl.prod(x, 1)),
        (x.any(0), ndl.any(x, 0)),
        (x.all(), ndl.all(x)),
        (x.argmax(1), ndl.argmax(x, 1)),
        (x.argmin(), ndl.argmin(x)),
        (x.cumsum(1), ndl.cumsum(x, 1)),
        (x.reshape(4), ndl.reshape(x, 4)),
        (x.reshape((4, 1)), ndl.reshape(x, (4, 1))),
        (x.reshape(4, -1), ndl.reshape(x, (4, 1))),
        (x.broadcast_to((3, 2, 2)), ndl.broadcast_to(x, (3, 2, 2))),
        (x.transpose(), ndl.transpose(x)),
        (x.transpose((0, 1)), x.transpose(0, 1)),
        (x.permute((1, 0)), x.permute(1, 0)),
        (x.flatten(), ndl.flatten(x)),
        (x.unsqueeze(0).squeeze(0), x),
        (x.exp(), ndl.exp(x)),
        (x.log(), ndl.log(x)),
        (x.sqrt(), ndl.sqrt(x)),
        (x.tanh(), ndl.tanh(x)),
        (x.relu(), ndl.relu(x)),
        (x.abs(), ndl.abs(x)),
        (x.clip(1, 2), ndl.clip(x, 1, 2)),
        (x.astype("float32"), ndl.astype(x, "float32")),
        (x.to("float32"), ndl.astype(x, "float32")),
    ):
        assert_same_bits(found, expected)
    assert x.to(ndl.cpu_numpy()).device is ndl.cpu_numpy()
    assert x.to(ndl.cpu()) is x


def test_gradients_cross_devices() -> None:
    x = numbers(1.0, 2.0)
    (x.to(ndl.cpu_numpy()) * 3).sum().backward()
    assert x.grad is not None
    assert x.grad.device is ndl.cpu()
    assert x.grad.tolist() == [3, 3]


# Random programs

SMOOTH: list[tuple[int, Any, Any]] = [
    (1, ndl.tanh, np.tanh),
    (1, lambda x: ndl.sin(x) * 0.5, lambda x: np.sin(x) * 0.5),
    (1, ndl.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    (1, lambda x: ndl.softmax(x, 0), lambda x: np.exp(x) / np.exp(x).sum(0)),
    (1, lambda x: x - x.mean(1, keepdims=True), lambda x: x - x.mean(1, keepdims=True)),
    (1, lambda x: x[::-1, [1, 0, 2]], lambda x: x[::-1, [1, 0, 2]]),
    (1, lambda x: x.T.reshape(3, 3), lambda x: x.T.reshape(3, 3)),
    (1, lambda x: x.sum(0) + 2.0 * x, lambda x: x.sum(0) + 2.0 * x),
    (1, lambda x: ndl.split(x, 0)[1] * x, lambda x: x[1] * x),
    (2, lambda a, b: a + b, lambda a, b: a + b),
    (2, lambda a, b: a - b, lambda a, b: a - b),
    (2, lambda a, b: a * b, lambda a, b: a * b),
    (2, lambda a, b: a / (b * b + 1.0), lambda a, b: a / (b * b + 1.0)),
    (2, lambda a, b: (a @ b) / 3, lambda a, b: (a @ b) / 3),
    (2, lambda a, b: ndl.concatenate([a, b])[1:4], lambda a, b: np.concatenate([a, b])[1:4]),
]


@st.composite
def programs(draw: Any) -> list[tuple[int, list[int]]]:
    """Steps of (op, places of its operands): any value so far, the two inputs first."""
    steps = []
    for count in range(2, 2 + draw(st.integers(1, 8))):
        kind = draw(st.integers(0, len(SMOOTH) - 1))
        places = [draw(st.integers(max(count - 4, 0), count - 1)) for _ in range(SMOOTH[kind][0])]
        steps.append((kind, places))
    return steps


def run(program: list[tuple[int, list[int]]], which: int, *inputs: Any) -> Any:
    values = list(inputs)
    for kind, places in program:
        values.append(SMOOTH[kind][which](*(values[place] for place in places)))
    return values[-1]


@given(programs())
@settings(max_examples=50)
def test_random_programs(program: list[tuple[int, list[int]]]) -> None:
    """Gradients, second order, and the same bits in every mode, where values are shared at will."""
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(-1, 1, (3, 3)), rng.uniform(0.5, 1.5, (3, 3))]
    ours, reference = partial(run, program, 1), partial(run, program, 2)
    assert_gradient(ours, reference, arrays, (0, 1), rng)
    assert_second_order(ours, arrays, (0, 1), rng)
    assert_lazy_is_eager(ours, arrays, (0, 1), ndl.lazy)


@pytest.mark.parametrize("forward_lazy", [False, True], ids=["eager first", "lazy first"])
def test_modes_may_change_between_forward_and_backward(forward_lazy: bool) -> None:
    arrays = [np.linspace(-1, 1, 9).reshape(3, 3), np.linspace(0.5, 2, 9).reshape(3, 3)]
    program = [(kind, [0, 1][: SMOOTH[kind][0]]) for kind in range(len(SMOOTH))]
    for last in range(1, len(program) + 1):
        found = []
        for first, second in ((False, False), (forward_lazy, not forward_lazy)):
            tensors = [Tensor(x) for x in arrays]
            with mode(first):
                y = run(program[:last], 1, *tensors)
            with mode(second):
                y.backward()
            found.append([x.grad.numpy() for x in tensors if x.grad is not None])
        for grad, expected in zip(*found, strict=True):
            assert_same_bits(grad, expected)


def test_gradients_of_mixed_dtypes_go_back_to_their_own() -> None:
    x, y = Tensor(np.ones(2, np.float32)), Tensor(np.ones((2, 1)))
    z = Tensor(np.ones(2), dtype="bfloat16")
    (x * y + y / x - z * x).sum().backward()
    for tensor, dtype in ((x, "float32"), (y, "float64"), (z, "bfloat16")):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        assert tensor.grad.shape == tensor.shape
