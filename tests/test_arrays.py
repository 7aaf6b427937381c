"""NDArray: what it is made of, strides, views, writing in place, protocols, devices, memory."""

from __future__ import annotations

import gc
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checks import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import needle as ndl
from needle import NDArray, Tensor, ops
from needle import backend_ndarray as nd
from needle.dtype import DTYPES, FLOATS

SIX = np.arange(6.0).reshape(2, 3)


def array(shape: tuple[int, ...] = (2, 3), dtype: Any = np.float64) -> NDArray:
    return NDArray(np.arange(np.prod(shape)).reshape(shape).astype(dtype))


def shares(a: NDArray, b: NDArray) -> bool:
    return np.shares_memory(a.numpy(), b.numpy())


# Making


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_an_array_is_copied_with_its_dtype(dtype: Any) -> None:
    x = np.arange(6).reshape(2, 3).astype(dtype)
    a = NDArray(x)
    assert_same_bits(a, x)
    assert not np.shares_memory(a.numpy(), x)
    assert (a.shape, a.ndim, a.size, a.nbytes) == ((2, 3), 2, 6, 6 * dtype.itemsize)
    assert a.strides == (3, 1)
    assert a.is_compact()


def test_what_an_array_can_be_made_of() -> None:
    class Holder:
        def __init__(self) -> None:
            self.values = np.ones(2)

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return self.values

    holder = Holder()
    for source in (holder, holder.values, NDArray(holder.values), Tensor(holder.values)):
        a = NDArray(source)
        a[0] = 7
        assert holder.values.tolist() == [1, 1]
        assert np.asarray(source).tolist() == [1, 1]
    assert NDArray(3).tolist() == 3
    assert NDArray(range(3)).tolist() == [0, 1, 2]
    assert NDArray([[1, 2], (3, 4)]).tolist() == [[1, 2], [3, 4]]
    assert NDArray([np.ones(2), Tensor([2.0, 2.0])]).tolist() == [[1, 1], [2, 2]]
    assert NDArray(np.float16(1.5)).dtype == np.float16
    assert NDArray(SIX.T).strides == (2, 1)
    assert NDArray(SIX[::-1, ::2]).tolist() == [[3, 5], [0, 2]]


def test_make_new_memory_and_views_on_a_handle() -> None:
    assert NDArray.make((2, 3)).shape == (2, 3)
    assert NDArray.make((2, 3)).dtype == np.float32
    a = array()
    handle = a._handle
    assert handle.ptr() == a.numpy().ctypes.data
    for made, expected in (
        (NDArray.make((3, 2), strides=(1, 3), handle=handle), SIX.T),
        (NDArray.make((2,), strides=(2,), handle=handle, offset=3), [3, 5]),
        (NDArray.make((3,), strides=(-1,), handle=handle, offset=5), [5, 4, 3]),
        (NDArray.make((4, 2), strides=(0, 1), handle=handle, offset=2), [[2, 3]] * 4),
        (NDArray.make((), handle=handle, offset=4), 4),
        (NDArray.make((0, 5), handle=handle), np.zeros((0, 5))),
        (NDArray.make((6,), handle=a.permute((1, 0))._handle), np.arange(6)),
    ):
        np.testing.assert_array_equal(made.numpy(), expected)
        assert not made.size or shares(made, a)
    NDArray.make((1,), handle=handle, offset=1)[0] = 9
    assert a.tolist() == [[0, 9, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((7,), None, 0),
        ((2,), (6,), 0),
        ((2,), (-1,), 0),
        ((1,), (1,), 6),
        ((1,), (1,), -1),
        ((3,), (-1,), 6),
    ],
    ids=str,
)
def test_make_refuses_views_outside_the_memory(shape: Any, strides: Any, offset: int) -> None:
    with pytest.raises(
        ValueError, match=r"^NDArray.make: expected a view inside 6 elements; received "
    ):
        NDArray.make(shape, strides=strides, handle=array()._handle, offset=offset)


# Views


def test_views_share_memory_and_copies_do_not() -> None:
    a = array((2, 3, 4))
    for view, strides in (
        (a.reshape((6, 4)), (4, 1)),
        (a.reshape(24), (1,)),
        (a.reshape(2, -1), (12, 1)),
        (a.permute((2, 0, 1)), (1, 12, 4)),
        (a.broadcast_to((5, 2, 3, 4)), (0, 12, 4, 1)),
        (a[1], (4, 1)),
        (a[:, ::2, 1:3], (12, 8, 1)),
        (a[::-1], (-12, 4, 1)),
        (a.flip((0, 2)), (-12, 4, -1)),
        (a[None, ..., None], (0, 12, 4, 1, 0)),
        (a.compact(), (12, 4, 1)),
        (a.to(ndl.cpu()), (12, 4, 1)),
    ):
        assert shares(view, a)
        assert tuple(
            s if n > 1 else 0 for s, n in zip(view.strides, view.shape, strict=True)
        ) == tuple(s if n > 1 else 0 for s, n in zip(strides, view.shape, strict=True))
    for copy in (
        a.copy(),
        a.permute((2, 0, 1)).compact(),
        a.permute((2, 0, 1)).reshape(24),
        a.astype("float64"),
        a.astype("float32"),
        a[[0, 1]],
        a[a.numpy() > 3],
        a.to(ndl.cpu_numpy()),
    ):
        assert not shares(copy, a)


def test_a_transposed_view_is_not_compact_until_it_is_made_so() -> None:
    a = array()
    t = a.permute((1, 0))
    assert not t.is_compact()
    assert t.compact().is_compact()
    assert t.compact().tolist() == SIX.T.tolist()
    assert a.permute((-1, 0)).shape == (3, 2)
    assert a.process_slice(slice(None, -1, 2), 1) == slice(0, 2, 2)


@given(st.data())
def test_indexing_and_writing_are_numpys(data: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    x = np.arange(np.prod(shape)).reshape(shape).astype(float)
    a = NDArray(x)
    view = a[index]
    np.testing.assert_array_equal(view.numpy(), x[index])
    x[index] = -1
    a[index] = -1
    np.testing.assert_array_equal(a.numpy(), x)
    np.testing.assert_array_equal(view.numpy(), x[index])


def test_writing_shows_in_every_view() -> None:
    a = array()
    flipped, transposed = a.flip((1,)), a.permute((1, 0))
    a[0, 1:] = NDArray([10.0, 20.0])
    assert flipped.tolist() == [[20, 10, 0], [5, 4, 3]]
    assert transposed[1].tolist() == [10, 4]
    transposed[0] = [7, 8]
    assert a.tolist() == [[7, 10, 20], [8, 4, 5]]
    a.flat[4] += 0.5
    assert a[1, 1].item() == 4.5
    a[a.numpy() > 9] = 0
    assert a.tolist() == [[7, 0, 0], [8, 4.5, 5]]
    a[[1, 0], NDArray([0, 2]).astype("int64")] = 1
    assert a.tolist() == [[7, 0, 1], [1, 4.5, 5]]


def test_a_broadcast_view_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        array((1,)).broadcast_to((3,))[0] = 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda a: a.reshape((4, 2)),
            r"^reshape: expected a shape of 6 elements; received \(4, 2\) for \(2, 3\)$",
        ),
        (
            lambda a: a.reshape((-1, -1)),
            r"^reshape: expected a shape of 6 elements; received \(-1, -1\)",
        ),
        (
            lambda a: a.reshape((-1, 4)),
            r"^reshape: expected a shape of 6 elements; received \(-1, 4\)",
        ),
        (lambda a: a.permute((0, 0)), r"^permute: expected an order of 2 axes; received \(0, 0\)$"),
        (lambda a: a.permute((0, 2)), r"^permute: expected an axis between -2 and 1; received 2$"),
        (lambda a: a.broadcast_to((2, 4)), r"^broadcast_to: .*\(2, 3\).*\(2, 4\)"),
        (lambda a: a.flip((2,)), r"^flip: expected an axis between -2 and 1; received 2$"),
        (
            lambda a: a + array((4,)),
            r"^add: expected shapes that broadcast together; received \(2, 3\) and \(4,\)$",
        ),
        (lambda a: a @ a, r"^matmul: inner dimensions differ: \(2, 3\) @ \(2, 3\)$"),
    ],
    ids=range(9),
)
def test_errors_of_shapes(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(array())


# Ops in eager mode: planned once for the forms of their operands


def movements(x: Tensor) -> dict[str, Tensor]:
    first, second = ndl.split(x, 0, (1, 2))
    return {
        "reshape": x.reshape(2, 6),
        "permute": x.permute(1, 0),
        "transpose": x.transpose(),
        "broadcast_to": x.broadcast_to(2, 3, 4),
        "slice": x[1:, ::2],
        "item": x[2],
        "flip": ndl.flip(x, 0),
        "split": second,
        "first": first,
        "detach": x.detach(),
        "tuple": ndl.make_tuple(x, x)[1],
        "own dtype": x.astype(x.dtype),
    }


@pytest.mark.parametrize("name", movements(Tensor(np.zeros((3, 4)))))
def test_movements_share_memory_wherever_their_operand_lies(name: str) -> None:
    whole = np.arange(48.0).reshape(4, 3, 4)
    ours, foreign = Tensor(whole), ndl.from_numpy(whole)
    sources = [ours[1], ours[3], foreign[2], ndl.from_numpy(whole[0]), Tensor(whole[1])]
    for x in sources * 2:
        y, expected = movements(x)[name], movements(x.to(ndl.cpu_numpy()))[name]
        assert_same_bits(y, expected.numpy())
        assert np.shares_memory(y.numpy(), x.numpy())
        assert y.cached_data.storage is x.cached_data.storage
        assert y.cached_data.strides == y.cached_data.form.strides
        assert y.cached_data.ptr == y.numpy().ctypes.data


def test_items_of_a_tuple_are_the_operands_in_their_places() -> None:
    x, z = Tensor([1.0]), Tensor([2.0])
    for pair in ((x, x), (x, z), (z, x)):
        with ndl.lazy():
            found = ndl.make_tuple(*pair)
        assert found.numpy()[0] == pair[0].numpy()
        assert found.numpy()[1] == pair[1].numpy()
        assert [each.numpy().item() for each in ops.MakeTensorTuple()(*pair)] == [
            each.item() for each in pair
        ]


@pytest.mark.parametrize("dtype", sorted(DTYPES - {np.dtype(bool)}, key=str), ids=str)
def test_ops_with_a_number_have_the_references_bits(dtype: Any) -> None:
    values = np.array([0, 1, 2, 5, 100, 117], dtype)
    numbers = [1, 0, -0.0, 0.0, 2, 3, True, 7.3, 1e-3] if dtype in FLOATS else [1, 0, 2, 3, True]
    for number in [*numbers, *numbers]:
        for call in (
            lambda x, number=number: x + number,
            lambda x, number=number: x - number,
            lambda x, number=number: x * number,
            lambda x, number=number: x / number,
            lambda x, number=number: number - x,
        ):
            with np.errstate(all="ignore"):
                found, expected = (call(Tensor(values, device=d)) for d in ndl.all_devices()[::2])
            assert found.device is ndl.cpu()
            assert expected.device is ndl.cpu_numpy()
            assert_same_bits(found, expected.numpy())


def test_zeros_and_numbers_of_other_kinds_are_not_mistaken_for_one_another() -> None:
    zeros = Tensor([0.0, -0.0])
    for _ in range(2):
        assert np.signbit((zeros + -0.0).numpy()).tolist() == [False, True]
        assert np.signbit((zeros + 0.0).numpy()).tolist() == [False, False]
        assert np.signbit((zeros * -1.0).numpy()).tolist() == [True, False]
        assert (Tensor([3], dtype="int8") * 2).dtype == "int8"
        assert (Tensor([3], dtype="int8") * 2.0).dtype == "float64"
        assert (Tensor([True]) + True).dtype == "bool"
        assert (Tensor([True]) + 1).dtype == "int64"
        assert (ndl.maximum(Tensor([-1.0]), -0.0)).numpy().tobytes() == np.float32(-0.0).tobytes()
        assert (ndl.maximum(Tensor([-1.0]), 0.0)).numpy().tobytes() == np.float32(0.0).tobytes()


def test_a_planned_op_still_sees_the_mode_the_history_and_the_devices() -> None:
    x, v = Tensor([[1.0, 2.0], [3.0, 4.0]]), Tensor([1.0, 1.0])
    fixed = x.detach()
    for _ in range(3):
        y = x - v
        assert isinstance(y.op, ops.EWiseAdd)
        assert (y.inputs[0], y.inputs[1].op) == (x, ops.Negate())
        assert y.inputs[1].inputs[0].inputs == (v,)
        y.backward()
        assert v.grad.tolist() == [-2, -2]
        assert (fixed - v.detach()).op is None
        with ndl.no_grad():
            assert (x - v).inputs == ()
        with ndl.lazy():
            waiting = x - v
        assert waiting.cached_data is None
        assert waiting.tolist() == y.tolist() == [[0, 1], [2, 3]]
        with pytest.raises(ValueError, match="^subtract: expected inputs on one device"):
            x - v.to(ndl.cpu_numpy())


def test_users_ops_run_each_time_and_take_any_arrays() -> None:
    class Twice(ndl.TensorOp):
        calls = 0

        def compute(self, x: Any) -> Any:
            Twice.calls += 1
            return x * 2 if x.ndim else float(x) * 2

        def gradient(self, out_grad: Any, node: Any) -> Any:
            return out_grad * 2

    op, x = Twice(), Tensor(SIX)
    for times in range(1, 4):
        y = op(x.transpose())
        assert Twice.calls == times
        assert_same_bits(y, SIX.T * 2)
        (y + 1).backward()
        assert_same_bits(x.grad, np.full((2, 3), 2.0))
    assert op(Tensor(3.0)).item() == 6


def test_threads_compute_at_once() -> None:
    x, w = Tensor(np.random.randn(40, 30)), Tensor(np.random.randn(30))
    large = Tensor(np.random.randn(300_000))

    def work() -> bytes:
        y = ndl.softmax(x * w - 0.5).sum(0) + w
        y.backward(Tensor(np.ones(30)))
        return y.numpy().tobytes() + (large * 2.0 + large).numpy().tobytes()

    expected = work()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: work(), range(60)))
    assert set(found) == {expected}


# Arithmetic is the ops', without history


def test_arithmetic_of_arrays() -> None:
    a, b = array(), NDArray(SIX + 1)
    x, y = a.numpy(), b.numpy()
    for found, expected in (
        (a + b, x + y),
        (a - b, x - y),
        (a * 2, x * 2),
        (2 - a, 2 - x),
        (a / b, x / y),
        (1 / b, 1 / y),
        (a**2, x**2),
        (-a, -x),
        (a @ b.permute((1, 0)), x @ y.T),
        (a == 2, x == 2),
        (a != b, x != y),
        (a < 2, x < 2),
        (a >= b, x >= y),
        (b.log(), np.log(y)),
        (a.exp(), np.exp(x)),
        (a.tanh(), np.tanh(x)),
        (a.maximum(2.5), np.maximum(x, 2.5)),
        (a.sum(), x.sum()),
        (a.sum(axis=1, keepdims=True), x.sum(1, keepdims=True)),
        (a.max(axis=0), x.max(0)),
        (a.pad(((0, 0), (1, 2))), np.pad(x, ((0, 0), (1, 2)))),
    ):
        assert isinstance(found, NDArray)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-15)
    assert (array(dtype=np.float32) * 2.5).dtype == np.float32
    assert (np.ones(3) + a).tolist() == (x + 1).tolist()


def test_an_array_and_a_tensor_make_a_tensor() -> None:
    x = Tensor([1.0, 2.0, 3.0])
    for y in (NDArray([1.0, 1.0, 1.0]) + x, x + NDArray([1.0, 1.0, 1.0])):
        assert isinstance(y, Tensor)
        assert y.requires_grad
        assert y.tolist() == [2, 3, 4]


def test_an_array_as_a_python_object() -> None:
    a = array()
    assert len(a) == 2
    assert [row.tolist() for row in a] == SIX.tolist()
    assert float(a[1, 2]) == int(a[1, 2]) == a[1, 2].item() == 5
    assert bool(a[0, 1])
    assert repr(array((3,))) == "NDArray([0., 1., 2.], device=cpu())"
    assert str(array((3,))) == "[0. 1. 2.]"
    b = pickle.loads(pickle.dumps(a.permute((1, 0))))
    assert_same_bits(b, SIX.T)
    assert pickle.loads(pickle.dumps(NDArray(1.5))).shape == ()


# Sharing memory with others


def test_numpy_shares_memory() -> None:
    a = array()
    for x in (a.numpy(), np.asarray(a), np.from_dlpack(a), np.asarray(Tensor.make_const(a))):
        assert np.shares_memory(x, a.numpy())
    assert not np.shares_memory(np.array(a), a.numpy())
    assert np.asarray(a, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="copy"):
        np.asarray(a, np.float32, copy=False)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_dlpack_both_ways_with_numpy(dtype: str) -> None:
    x = np.arange(6).reshape(2, 3).astype(dtype)
    t = ndl.from_dlpack(x)
    assert not t.requires_grad
    assert np.shares_memory(t.numpy(), x)
    x[0, 1] = 0
    assert not t.numpy()[0, 1]
    back = np.from_dlpack(t)
    assert_same_bits(back, x)
    assert np.shares_memory(back, x)
    assert_same_bits(np.from_dlpack(ndl.from_dlpack(x[:, ::-1].T)), x[:, ::-1].T)


def test_from_numpy_shares_what_a_tensor_copies() -> None:
    x = np.ones((2, 2))
    shared, copied = ndl.from_numpy(x), Tensor(x)
    x[0, 0] = 5
    assert shared.tolist() == [[5, 1], [1, 1]]
    assert copied.tolist() == [[1, 1], [1, 1]]
    shared.numpy()[1, 1] = 7
    assert x[1, 1] == 7


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool"])
def test_dlpack_both_ways_with_pytorch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    ours = ndl.from_dlpack(theirs)
    assert ours.dtype == dtype
    theirs[0, 2] = 0
    assert ours.numpy()[0, 2] == 0
    back = torch.from_dlpack(ours)
    assert back.data_ptr() == theirs.data_ptr()
    back[1, 1] = 1
    assert ours.numpy()[1, 1] == 1
    transposed = torch.from_dlpack(ours.T)
    assert transposed.shape == (3, 2)
    assert torch.equal(transposed, theirs.T)
    assert torch.equal(torch.from_dlpack(Tensor([1.0, 2.0]).cached_data), torch.tensor([1.0, 2.0]))


def test_dlpack_says_what_it_cannot_take() -> None:
    with pytest.raises(
        TypeError, match=r"^from_dlpack: expected an object with __dlpack__; received list$"
    ):
        ndl.from_dlpack([1, 2])
    with pytest.raises(
        BufferError, match=r"^DLPack: NumPy exports no bfloat16; use .astype\('float32'\) first$"
    ):
        np.from_dlpack(Tensor([1.0], dtype="bfloat16"))
    with pytest.raises(
        TypeError, match=r"^from_numpy: expected a NumPy array of .*; received uint16$"
    ):
        ndl.from_dlpack(np.ones(2, np.uint16))
    for bad in ([1.0], np.ones(2, "U1"), np.ones(2, np.complex64)):
        with pytest.raises(
            TypeError, match=r"^from_numpy: expected a NumPy array of .*; received "
        ):
            ndl.from_numpy(bad)  # type: ignore[arg-type]


def test_dlpack_refuses_pytorchs_gradients() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(
        ValueError, match=r"^from_dlpack: expected a CPU array of numbers; received one that says: "
    ):
        ndl.from_dlpack(torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match=r"^from_dlpack: "):
        ndl.from_dlpack(torch.ones(2, dtype=torch.bfloat16))


def test_a_tensor_takes_pytorchs_tensors_by_copying() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.ones(2, dtype=torch.float64)
    ours = Tensor(theirs)
    theirs[0] = 5
    assert ours.dtype == "float64"
    assert ours.tolist() == [1, 1]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 brought __buffer__ (PEP 688)")
def test_the_buffer_protocol_shares_memory() -> None:
    a = array()
    view = memoryview(a)
    assert (view.shape, view.format) == ((2, 3), "d")
    view[0, 1] = 9.0
    assert a[0, 1].item() == 9


# What a Tensor refuses

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "ragged": (
        [[1, 2], [3]],
        ValueError,
        r"^Tensor: expected lists of equal lengths; received ragged ones$",
    ),
    "text": ("abc", TypeError, r"^Tensor: expected real numbers; received str of <U3$"),
    "None": (None, TypeError, r"^Tensor: expected real numbers; received NoneType of object$"),
    "an object": (
        object(),
        TypeError,
        r"^Tensor: expected real numbers; received object of object$",
    ),
    "objects in a list": (
        [1, None],
        TypeError,
        r"^Tensor: expected real numbers; received list of object$",
    ),
    "complex": (1j, TypeError, r"^Tensor: expected real numbers; received complex of complex128$"),
    "text in a list": (
        ["a", "b"],
        TypeError,
        r"^Tensor: expected real numbers; received list of <U1$",
    ),
    "uint64": (
        np.ones(2, np.uint64),
        TypeError,
        r"^Tensor: expected an array of float64, .*; received uint64; ",
    ),
    "complex array": (
        np.ones(2, complex),
        TypeError,
        r"^Tensor: expected an array of .*; received complex128; ",
    ),
    "object array": (
        np.array([None]),
        TypeError,
        r"^Tensor: expected an array of .*; received object; ",
    ),
    "dates": (
        np.array(["2020-01-01"], "M8[D]"),
        TypeError,
        r"^Tensor: expected an array of .*; received datetime64",
    ),
    "a dictionary": (
        {"a": 1},
        TypeError,
        r"^Tensor: expected real numbers; received dict of object$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_array(case: str) -> None:
    value, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        Tensor(value)
    with pytest.raises(error, match=words):
        NDArray(value)
    if case != "uint64":
        with pytest.raises((TypeError, ValueError), match=r"^Tensor: expected "):
            Tensor(value, dtype="float32")


def test_dtypes_that_do_not_exist_or_do_not_fit() -> None:
    assert Tensor(np.ones(2, np.uint64), dtype="int64").tolist() == [1, 1]
    for dtype in ("float33", "uint16", "complex64", object, "U5", np.longdouble, 3):
        with pytest.raises(TypeError, match=r"^dtype: expected one of float64, float32, "):
            Tensor([1.0], dtype=dtype)
    with pytest.raises(
        ValueError, match=r"^Tensor: expected integers that fit int8; received 300$"
    ):
        Tensor([1, 300], dtype="int8")
    with pytest.raises(
        ValueError, match=r"^Tensor: expected integers that fit uint8; received -1$"
    ):
        Tensor([[-1, 300]], dtype="uint8")
    assert Tensor([300.7], dtype="int8").tolist() == [127]
    with pytest.raises(TypeError, match="unexpected keyword argument 'shape'"):
        Tensor([1.0], shape=2)  # type: ignore[call-arg]


# Devices


def test_devices_are_single_objects_with_names() -> None:
    assert ndl.cpu() is ndl.cpu() is ndl.default_device()
    assert (str(ndl.cpu()), str(ndl.cpu_numpy()), str(ndl.cuda())) == (
        "cpu()",
        "cpu_numpy()",
        "cuda()",
    )
    assert ndl.cpu().enabled()
    assert not ndl.cuda().enabled()
    assert set(ndl.all_devices()) == {ndl.cpu(), ndl.cpu_numpy(), ndl.cuda()}
    assert pickle.loads(pickle.dumps(ndl.cpu_numpy())) is ndl.cpu_numpy()
    with pytest.raises(
        ValueError, match=r"^to: expected a device that this machine has; received cuda\(\); "
    ):
        Tensor([1.0]).to(ndl.cuda())


def test_the_environment_chooses_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEEDLE_BACKEND", "np")
    assert Tensor([1.0]).device is ndl.cpu_numpy()
    monkeypatch.setenv("NEEDLE_BACKEND", "nd")
    assert Tensor([1.0]).device is ndl.cpu()
    monkeypatch.setenv("NEEDLE_BACKEND", "torch")
    with pytest.raises(ValueError, match=r"^NEEDLE_BACKEND: expected np or nd; received 'torch'$"):
        Tensor([1.0])


def test_ops_stay_on_their_device_and_do_not_mix() -> None:
    x = Tensor([1.0, 2.0], device=ndl.cpu_numpy())
    for y in (
        x + 1,
        1 / x,
        x * np.ones(2),
        ndl.where(x > 1, 1.0, 0.0),
        ndl.concatenate([x, [3.0]]),
        x[[0]],
    ):
        assert y.device is ndl.cpu_numpy()
    with pytest.raises(
        ValueError,
        match=r"^add: expected inputs on one device; received cpu_numpy\(\) and cpu\(\); ",
    ):
        x + Tensor([1.0, 2.0])


# Memory


@contextmanager
def balanced() -> Iterator[None]:
    """What is live before and after is the same."""
    gc.collect()
    gc.disable()
    try:
        before = ndl.memory.live(), ndl.memory.live_values()
        yield
        assert (ndl.memory.live(), ndl.memory.live_values()) == before
    finally:
        gc.enable()


def test_live_bytes_return_to_where_they_were() -> None:
    def work() -> None:
        x = Tensor(np.ones((8, 8)))
        for _ in range(3):
            y = ndl.softmax(x @ x.T, -1).sum(0).reshape(2, 4)
            z = ndl.concatenate([y, y * 2])[1:, ::2] + ndl.split(y, 0)[1].sum()
            z.backward()
            x.grad = None

    work()
    with balanced():
        work()


def test_views_count_once_and_memory_lives_as_long_as_its_last_view() -> None:
    with balanced():
        before = ndl.memory.live()
        a = array((4, 4))
        assert ndl.memory.live() == before + 128
        views = [
            a[1],
            a.permute((1, 0)),
            a.reshape(16),
            a.broadcast_to((3, 4, 4)),
            a.flip((0,)),
            a[1][2:],
        ]
        tensors = [Tensor.make_const(a), Tensor.make_const(a).T, Tensor.make_const(a)[1:].detach()]
        assert ndl.memory.live() == before + 128
        del a, tensors
        kept = views.pop()
        views.clear()
        assert ndl.memory.live() == before + 128
        del kept
        assert ndl.memory.live() == before


def test_results_that_are_views_of_new_memory_count_it() -> None:
    with balanced():
        before = ndl.memory.live()
        t = Tensor(np.arange(24.0).reshape(2, 3, 4), requires_grad=False)
        copied = ndl.reshape(t.T, (24,))
        assert ndl.memory.live() == before + 2 * 192
        assert copied[:3].shape == (3,)
        del t, copied


def test_the_peak_is_the_most_there_was() -> None:
    gc.collect()
    ndl.memory.reset_peak()
    before = ndl.memory.live()
    a = array((1000,))
    del a
    b = array((10,))
    assert ndl.memory.live() == before + 80
    assert ndl.memory.peak() >= before + 8000
    ndl.memory.reset_peak()
    assert ndl.memory.peak() == before + 80
    report = ndl.memory.report()
    assert (report.live, report.peak) == (before + 80, before + 80)
    assert "live values" in str(report)
    assert b.size == 10


# The course's module


def test_the_courses_functions() -> None:
    a = nd.array([[1, 2], [3, 4]])
    assert a.dtype == np.float32
    assert nd.array(a, device=nd.cpu_numpy()).device is nd.cpu_numpy()
    assert nd.full((2, 2), 3).tolist() == [[3, 3], [3, 3]]
    assert nd.empty((0, 3)).shape == (0, 3)
    assert nd.array(np.ones(2, ml_dtypes.bfloat16), dtype="bfloat16").dtype == "bfloat16"
    assert nd.default_device() is nd.cpu()
