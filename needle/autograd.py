"""The graph: every value is a node `Value(op, inputs)`; reverse mode walks the nodes backwards.

A node is evaluated in one of two ways, with the same bits: *eager* (the default) computes it when
its op is called, *lazy* (`ndl.lazy()`, LAZY_MODE) when somebody asks for it. A node keeps its op
and inputs only if it requires a gradient, or until it is computed. This file knows no concrete op:
Tensor's operators are looked up in OPS, which needle.ops fills in.

    Op        what a node computes: infer (shapes, dtypes, errors), compute (values), gradient (in
    terms of ops)
    Value     a node: Tensor, or TensorTuple for ops with several results
    backward  compute_gradient_of_variables, over find_topo_sort
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import reduce
from math import copysign, nan
from types import SimpleNamespace
from typing import Any, NoReturn, Self, TypeVar, dataclass_transform
from weakref import WeakSet, WeakValueDictionary

import numpy as np

from needle.array.ndarray import NDArray
from needle.array.spec import Spec
from needle.backend.device import Device, default_device
from needle.dtype import FLOATS, LOW_PRECISION, DType, as_dtype, bfloat16
from needle.errors import TraceError, expect

TENSOR_COUNTER = 0  # the number of live values
# Whether every op waits until its value is asked for; `ndl.lazy()` says so for a block.
LAZY_MODE = False

# The functions behind Tensor's operators and methods, registered by needle.ops.
OPS: Any = SimpleNamespace()


class Mode(threading.local):
    """How this thread builds nodes."""

    grad = True  # whether nodes keep the history that backward needs
    lazy = False  # whether they wait to be computed
    tracing = False  # whether they only describe a program, which nobody watches
    backward_of: Value | None = None  # the node whose gradient rule is running
    trace: Any = None  # what notes all that a jitted function does, while it is traced
    draw_from: Any = None  # while a jitted function runs op by op: gives its random generator
    autocast: DType | None = None  # of `ndl.autocast`: what contractions run in
    is_general = False  # lazy or autocast, so that `replay` leaves nodes to make_general
    record: Any = None  # what notes the ops of a checkpointed function, while it runs
    origin: Any = None  # of an op that stands in for one of a scan's body: an Origin of ops/scan.py


MODE = Mode()


RETAINED: WeakSet[Value] = WeakSet()  # results of ops whose `.grad` is wanted
HOLDERS: WeakValueDictionary[int, Any] = WeakValueDictionary()  # all Holders, by their id


class Holder:
    """What has Tensors as attributes, which a jitted function may read and replace: a Module, an
    Optimizer, a GradScaler."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        holder = object.__new__(cls)
        HOLDERS[id(holder)] = holder
        return holder


class Hooks:
    """What needle.debug listens to; None costs nothing."""

    node: Callable[[Value], None] | None = None  # after a node was computed
    create: Callable[[Value], None] | None = None  # after a node was made
    backward: Callable[[], None] | None = None  # after a backward()
    growth: Callable[[], None] | None = None  # when the live values pass `growth_at`
    growth_at = 1 << 62
    judge: Any = None  # told what each run of a jitted function made, before its results count


def is_lazy() -> bool:
    """Whether ops wait to be computed, here and now."""
    return LAZY_MODE or MODE.lazy


@contextmanager
def mode(**settings: Any) -> Iterator[None]:
    """Within the block this thread's Mode has other settings."""
    before = {name: getattr(MODE, name) for name in settings}
    change_mode(settings)
    try:
        yield
    finally:
        change_mode(before)


def change_mode(settings: dict[str, Any]) -> None:
    MODE.__dict__.update(settings)
    MODE.is_general = MODE.lazy or MODE.autocast is not None


def no_grad() -> AbstractContextManager[None]:
    """Within the block ops keep no history: their results require no gradient."""
    return mode(grad=False)


def enable_grad() -> AbstractContextManager[None]:
    """Within the block ops keep history again, inside a `no_grad()` block."""
    return mode(grad=True)


def lazy() -> AbstractContextManager[None]:
    """Within the block ops are computed when their value is asked for, not when they are called."""
    return mode(lazy=True)


def autocast(dtype: Any = bfloat16, enabled: bool = True) -> Any:
    """Within the block contractions run in bfloat16 or float16, and what needs range or adds up in
    float32; also a decorator.

    Operands of floats are cast op by op, by the lists of needle/ops/precision.py; float64 is left
    alone. Parameters stay as they are, and so do their gradients. Backward runs in the dtypes that
    forward used, whether inside the block or not. enabled: False turns an outer block off.
    TypeError for another dtype. (Micikevicius et al., 2018.)
    """
    found = as_dtype(dtype)
    received = f"autocast: expected bfloat16 or float16; received {found}"
    expect(found in LOW_PRECISION, received, TypeError)
    return mode(autocast=found if enabled else None)


# Ops

History = Callable[[Sequence[Any]], tuple["Op", tuple[Any, ...]]]


class Op:
    """What a node computes. Write `compute` and `gradient`; `infer` for clear errors and for
    tracing.

    infer(*specs) -> Spec                  the result's shape and dtype; raises every user error
    compute(*arrays) -> array              the reference meaning, NumPy arrays in and out
    gradient(out_grad, node) -> Tensor(s)  out_grad times the derivative by each input, in terms of
    ops
    """

    # Needle's own: its `compute` runs without NumPy's warnings, and in float32 for low precision.
    is_builtin = False
    moves = False  # only moves elements, so that low precision needs no rounding
    rounds_itself = False  # `compute` is made of ops, each of which rounds
    item: int | None = None  # of an op that takes one item of a TensorTuple: which
    sees_missing = False  # of an op with several results: whether items without gradient are None
    plans: dict[Any, Plan]  # of needle's own ops: by the forms of the operands

    def infer(self, *specs: Spec) -> Spec | tuple[Spec, ...]:
        with np.errstate(all="ignore"):
            found = self.compute(*(np.zeros(spec.shape, spec.dtype) for spec in specs))
        if isinstance(found, (tuple, list)):
            return tuple(Spec(np.shape(each), np.asarray(each).dtype) for each in found)
        return Spec(np.shape(found), np.asarray(found).dtype)

    def compute(self, *arrays: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: compute is not written")

    def gradient(self, out_grad: Any, node: Any) -> Any:
        cure = "detach its input, or write `gradient`"
        raise NotImplementedError(f"{type(self).__name__}: has no gradient; {cure}")

    def gradient_as_tuple(self, out_grad: Any, node: Any) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs, as a tuple also where there is one input."""
        found = self.gradient(out_grad, node)
        if isinstance(found, tuple):
            return found
        return tuple(found) if isinstance(found, list) else (found,)

    def specs_of(self, key: tuple[Any, ...]) -> Any:
        """`infer`, remembered: key is (shape, dtype) of each input in turn. None for a user's own
        op, which runs first."""
        if not self.is_builtin:
            return None
        known: dict[tuple[Any, ...], Any] = self.__dict__.setdefault("known_specs", {})
        found = known.get(key)
        if found is None:
            if len(known) >= 256:
                known.clear()
            found = known[key] = self.infer(*map(Spec, key[::2], key[1::2]))
        return found

    def history(self, arrays: Sequence[NDArray], spec: Any) -> History | None:
        """How a node's op and inputs follow from the operands that were computed with; None where
        they are the same."""
        return None

    def with_operand(self, spec: Any) -> tuple[Op, Any] | None:
        """The same op with its number as an operand, and the number, where that gives the same
        bits: numbers that change from call to call then share one kernel and its plan."""
        return None

    def __call__(self, *inputs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: subclass TensorOp or TensorTupleOp")

    def __repr__(self) -> str:
        listed = getattr(self, "__dataclass_fields__", ())
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in listed)
        return f"{type(self).__name__}({shown})"


class TensorOp(Op):
    """An op with one result."""

    def __call__(self, *inputs: Any) -> Tensor:
        found = replay(self, inputs)
        return Tensor.make_from_op(self, inputs) if found is None else found


class TensorTupleOp(Op):
    """An op with several results."""

    def __call__(self, *inputs: Any) -> TensorTuple:
        return TensorTuple.make_from_op(self, inputs)


AnyOp = TypeVar("AnyOp", bound=type[Op])


@dataclass_transform(frozen_default=True)
def with_fields(cls: AnyOp) -> AnyOp:
    """A class of ops whose annotations are fields, its own ones and those of the classes below."""
    # dataclass only collects the fields: writing methods by exec would cost 1 ms a class at import.
    return dataclass(init=False, repr=False, eq=False, match_args=False)(cls)  # type: ignore


@dataclass_transform(frozen_default=True)
def primitive(cls: AnyOp) -> AnyOp:
    """A class of needle's own ops: a frozen dataclass whose instances with equal fields are one
    object.

    Interned ops compare by identity, keep what `infer` said, and cost no dataclass. Scalars are
    equal if their type and bits are, so that 0.0, -0.0, 0 and False differ and NaN equals itself.
    """
    made: dict[Any, Any] = {}
    frozen = with_fields(cls)
    defaults = {field.name: field.default for field in fields(frozen)}  # type: ignore[arg-type]

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != len(defaults) or kwargs:
            args = bind(cls.__name__, defaults, args, kwargs)
        key = identity(args[0]) if len(args) == 1 else tuple(map(identity, args))
        try:
            op = made.get(key)
        except TypeError:
            return new(cls, *(hashable(cls, field) for field in args))
        if op is None:
            if len(made) >= 4096:
                made.clear()
            op = made[key] = object.__new__(cls)
            op.__dict__.update(zip(defaults, args, strict=True), plans={})
        return op

    def reduce(self: Any) -> tuple[Any, ...]:
        return cls, tuple(getattr(self, name) for name in defaults)

    frozen.__new__ = new  # type: ignore[method-assign]
    frozen.__init__ = object.__init__  # type: ignore[method-assign]
    frozen.__reduce__ = reduce  # type: ignore[method-assign]
    frozen.__setattr__ = refuse_assignment  # type: ignore[method-assign, assignment]
    frozen.is_builtin = True
    if not hasattr(frozen, "name"):
        frozen.name = snake_case(cls.__name__)  # type: ignore[attr-defined]
    return frozen


def bind(
    name: str, defaults: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The values of an op's fields, in order, from arguments and defaults."""
    given = dict(zip(defaults, args, strict=False)) | kwargs
    values = defaults | given
    missing = [field for field, value in values.items() if value is MISSING]
    if missing or len(values) > len(defaults) or len(given) < len(args) + len(kwargs):
        received = ", ".join([*map(repr, args), *(f"{key}={x!r}" for key, x in kwargs.items())])
        raise TypeError(f"{name}: expected fields ({', '.join(defaults)}); received ({received})")
    return tuple(values.values())


def refuse_assignment(op: Op, name: str, value: Any) -> NoReturn:
    raise AttributeError(f"{type(op).__name__}: ops are shared and cannot be changed: {name}")


def hashable(cls: type, field: Any) -> Any:
    """A field that is a list as a tuple, one that is an array of one element as a number."""
    if isinstance(field, list):
        return tuple(field)
    if isinstance(field, np.ndarray) and field.size == 1:
        return field.item()
    expect(
        isinstance(field, Hashable),
        f"{cls.__name__}: expected numbers and sequences of numbers; received {field!r}",
        TypeError,
    )
    return field


def identity(field: Any) -> Any:
    """A key that tells scalars apart by type and bits."""
    kind = type(field)
    if kind is tuple:
        return field
    if kind is float:
        return (kind, field, copysign(1.0, field)) if field == field else (kind, nan)
    return (kind, field) if kind is int or kind is bool else field


# Values


class Value:
    """A node of the graph. `op` is None for a leaf, and for a result whose history nobody needs."""

    __slots__ = (
        "__weakref__", "_grad", "cached_data", "inputs", "op", "operands", "requires_grad", "spec",
    )  # fmt: skip

    op: Op | None
    inputs: tuple[Value, ...]
    cached_data: Any  # NDArray, a tuple of them, or None where not computed
    spec: Any  # what infer said, of a node that is not computed
    operands: tuple[Any, ...] | None  # what that node will read: arrays, or nodes alike
    requires_grad: bool
    _grad: Any  # a Tensor; of an op's result the NDArray alone

    @classmethod
    def _new(cls, op: Op | None, inputs: tuple[Any, ...], data: Any, requires_grad: bool) -> Any:
        global TENSOR_COUNTER
        value: Any = object.__new__(cls)
        value.op = op
        value.inputs = inputs
        value.cached_data = data
        value.requires_grad = requires_grad
        value._grad = None
        TENSOR_COUNTER += 1
        if TENSOR_COUNTER >= Hooks.growth_at and Hooks.growth is not None:
            Hooks.growth()
        return value

    def __del__(self) -> None:
        global TENSOR_COUNTER
        TENSOR_COUNTER -= 1

    @classmethod
    def make_pending(cls, op: Op, inputs: tuple[Any, ...], spec: Any) -> Any:
        """A node that will be computed when its value is asked for, from what its inputs hold
        now."""
        value = cls._new(op, inputs, None, False)
        value.spec = spec
        for x in inputs:
            if x.requires_grad:
                value.requires_grad = MODE.grad and carries_gradient(spec)
                break
        if MODE.trace is not None:
            value.operands = MODE.trace.note(value, inputs)
        else:
            value.operands = tuple([x if x.cached_data is None else x.cached_data for x in inputs])
        if Hooks.create is not None and not MODE.tracing:
            Hooks.create(value)
        if MODE.record is not None:
            MODE.record.note(value, op, inputs)
        return value

    def realize_cached_data(self) -> Any:
        """The node's value, computed now if it was not."""
        if MODE.trace is not None:
            MODE.trace.check_read(self)
        if self.cached_data is None:
            realize(self)
        return self.cached_data

    def is_leaf(self) -> bool:
        """Whether no op made this value, or none that still matters."""
        return self.op is None


def carries_gradient(spec: Any) -> bool:
    return any(each.is_float for each in spec) if type(spec) is tuple else spec.is_float


def realize(value: Value) -> None:
    """Compute a pending node and the pending nodes it reads, without recursion."""
    stack = [value]
    while stack:
        node = stack[-1]
        if node.cached_data is not None:
            stack.pop()
            continue
        if node.op is None or node.operands is None:
            cure = "return it from the function, or keep its .item() after the call"
            raise TraceError(
                f"Tensor: expected a value; received one of a trace that ended; {cure}"
            )
        waiting = [x for x in node.operands if isinstance(x, Value) and x.cached_data is None]
        if waiting:
            stack.extend(waiting)
            continue
        data = [x.cached_data if isinstance(x, Value) else x for x in node.operands]
        node.cached_data = evaluate(node.op, flattened(data), node.spec)
        node.operands = None
        settle(node)
        stack.pop()


def flattened(parts: Sequence[Any]) -> list[Any]:
    """The parts, with the items of tuples among them in their place."""
    return [each for part in parts for each in (part if type(part) is tuple else (part,))]


def evaluate(op: Op, arrays: Sequence[NDArray], spec: Any) -> Any:
    """The op's value on the device of its arrays, as an NDArray or a tuple of them."""
    if op.is_builtin:
        return plan_for(op, arrays, spec).call(*arrays)
    return common_device(op, arrays).run(op, arrays, spec)


class Plan:
    """How one op is computed on operands of given forms, and what becomes of the result."""

    __slots__ = ("call", "history", "is_float", "kind")

    def __init__(self, op: Op, arrays: Sequence[NDArray], spec: Any) -> None:
        self.call: Callable[..., Any] = common_device(op, arrays).plan(op, arrays, spec)
        self.history = op.history(arrays, spec)
        self.is_float = carries_gradient(spec)  # whether the result can carry a gradient
        self.kind: Any = TensorTuple if type(spec) is tuple else Tensor


def plan_for(op: Op, arrays: Sequence[NDArray], spec: Any = None) -> Plan:
    """The plan of an op of needle's own, made at the first use of such operands."""
    forms = tuple([x.form for x in arrays])
    key: Any = forms[0] if len(forms) == 1 else forms
    found = op.plans.get(key)
    if found is None:
        if spec is None:
            spec = op.specs_of(tuple([part for x in forms for part in (x.shape, x.dtype)]))
        if len(op.plans) >= 256:
            op.plans.clear()
        found = op.plans[key] = Plan(op, arrays, spec)
    return found


def replay(op: Op, inputs: Sequence[Any]) -> Any:
    """The node of an op whose plan for such inputs is there; None where it is not, or where the
    node must wait, or autocast. The path of nearly every op in eager mode: written for speed."""
    if LAZY_MODE or MODE.is_general:
        if LAZY_MODE or MODE.lazy or type(op) in OPS.casts:
            return None
    try:
        if len(inputs) == 1:
            x = inputs[0]
            a = x.cached_data
            plan = op.plans[a.form]
        elif len(inputs) == 2:
            x, y = inputs
            a, b = x.cached_data, y.cached_data
            plan = op.plans[a.form, b.form]
        else:
            arrays = [x.cached_data for x in inputs]
            plan = op.plans[tuple([a.form for a in arrays])]
    except (AttributeError, KeyError):  # arrays, tuples, values that are not computed; a user's op
        return None
    if len(inputs) == 1:
        return make_node(op, inputs, plan, plan.call(a), x.requires_grad)
    if len(inputs) == 2:
        return make_node(op, inputs, plan, plan.call(a, b), x.requires_grad or y.requires_grad)
    requires_grad = any([x.requires_grad for x in inputs])
    return make_node(op, inputs, plan, plan.call(*arrays), requires_grad)


def make_node(op: Op, inputs: Sequence[Any], plan: Plan, data: Any, requires_grad: bool) -> Any:
    """The node of a computed value, with the history that it needs."""
    global TENSOR_COUNTER
    keeps = requires_grad and plan.is_float and MODE.grad
    watched = Hooks.node is not None or Hooks.create is not None
    if keeps or watched:
        op, inputs = (op, tuple(inputs)) if plan.history is None else plan.history(inputs)
    value = NEW(plan.kind)
    value.op, value.inputs = (op, inputs) if keeps or watched else (None, ())
    value.cached_data = data
    value.requires_grad = keeps
    value._grad = None
    TENSOR_COUNTER += 1
    if TENSOR_COUNTER >= Hooks.growth_at and Hooks.growth is not None:
        Hooks.growth()
    return announce(value) if watched else value


NEW: Any = object.__new__


def common_device(op: Op, arrays: Sequence[NDArray]) -> Device:
    """The one device of an op's inputs."""
    if not arrays:
        return default_device()
    device = arrays[0].form.device
    for array in arrays:
        if array.form.device is not device:
            refuse_devices(op, arrays)
    return device


def refuse_devices(op: Op, arrays: Sequence[NDArray]) -> NoReturn:
    listed = " and ".join(dict.fromkeys(str(array.device) for array in arrays))
    received = f"received {listed}; move one with .to(device)"
    raise ValueError(f"{op_name(op)}: expected inputs on one device; {received}")


def op_name(op: Op) -> str:
    """The op's name in errors: EWiseAdd -> ewise_add, unless the class has a `name`."""
    found = getattr(op, "name", None)
    return found if isinstance(found, str) else snake_case(type(op).__name__)


def snake_case(name: str) -> str:
    """ScatterAdd -> scatter_add"""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def unregistered(*args: Any, **kwargs: Any) -> Tensor:
    """Stands for a method that needle.ops has not set yet."""
    raise NotImplementedError("needle: import needle.ops first")


class Tensor(Value):
    """An array that knows how it was computed.

    array: a list, a number, a NumPy array, an NDArray or a Tensor. NumPy's dtype is kept; Python
    numbers become float32. requires_grad: whether backward computes `.grad`; tensors of integers
    and of bool never do.
    """

    __slots__ = ()
    by_rows = False  # of a table: whether a step changes only the rows that its gradient has
    __array_ufunc__ = None  # NumPy's operators leave `array + tensor` to Tensor.__radd__

    cached_data: NDArray
    inputs: tuple[Tensor, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        global TENSOR_COUNTER
        TENSOR_COUNTER += 1
        return object.__new__(cls)

    def __init__(
        self, array: Any, *, device: Any = None, dtype: Any = None, requires_grad: bool = True
    ) -> None:
        self.op = None
        self.inputs = ()
        self._grad = None
        self.requires_grad = False
        if isinstance(array, Tensor):
            data = array.realize_cached_data()
            same = dtype is None or data.dtype == as_dtype(dtype)
            data = data if same else data.astype(dtype)
            self.cached_data = data if device is None else data.to(device)
        else:
            device = array.device if isinstance(array, NDArray) and device is None else device
            self.cached_data = NDArray(array, device, dtype)
        self.requires_grad = requires_grad and self.cached_data.form.is_float
        if MODE.trace is not None:
            MODE.trace.make(self)

    @staticmethod
    def make_const(data: Any, requires_grad: bool = False) -> Tensor:
        """A leaf that shares the memory of an NDArray (of an array or a Tensor: converted)."""
        if not isinstance(data, NDArray):
            data = data.realize_cached_data() if isinstance(data, Value) else NDArray(data)
        found = Tensor._new(None, (), data, requires_grad and data.dtype in FLOATS)
        if MODE.trace is not None:
            MODE.trace.make(found)
        return found

    @staticmethod
    def make_from_op(op: Op, inputs: Sequence[Any], spec: Any = None) -> Tensor:
        """The node of an op on inputs, computed now unless lazy; spec: what `infer` says of it."""
        found = replay(op, inputs)
        return make_general(Tensor, op, as_values(inputs), spec) if found is None else found

    # What it holds

    @property
    def grad(self) -> Tensor | None:
        """What the last backward() found: of a leaf with history, of an op's result the value
        alone."""
        found = self._grad
        if type(found) is NDArray:
            found = self._grad = Tensor._new(None, (), found, False)
        if MODE.trace is not None:
            MODE.trace.meet_gradient(self, reads=True)
        return found

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if MODE.trace is not None:
            MODE.trace.meet_gradient(self)
        self._grad = value

    @property
    def shape(self) -> tuple[int, ...]:
        data = self.cached_data
        return self.spec.shape if data is None else data.form.shape

    @property
    def dtype(self) -> DType:
        data = self.cached_data
        return self.spec.dtype if data is None else data.form.dtype

    @property
    def device(self) -> Device:
        value: Any = self.cached_data
        if type(value) is NDArray:
            return value.form.device
        value = self
        while isinstance(value, Value) and value.cached_data is None:
            if not value.operands:
                return default_device()
            value = value.operands[0]
        data = value.cached_data if isinstance(value, Value) else value
        return data[0].device if type(data) is tuple else data.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return Spec(self.shape, self.dtype).size

    @property
    def T(self) -> Tensor:
        """The tensor with its axes in reverse order."""
        return OPS.permute(self, range(self.ndim)[::-1])

    @property
    def data(self) -> Tensor:
        """The same memory without history: `w.data = w.data - lr * w.grad.data` updates w and grows
        no graph."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            value = Tensor(value, device=self.device, dtype=self.dtype)
        if value.dtype != self.dtype:
            wrong = f"expected {self.dtype}; received {value.dtype}; convert with .astype(...)"
            raise TypeError(f"Tensor.data: {wrong}")
        if MODE.trace is not None:
            MODE.trace.write(self, value)
        else:
            self.cached_data = value.realize_cached_data()

    def detach(self) -> Tensor:
        """A tensor that shares this one's memory and requires no gradient."""
        data: NDArray | None = self.cached_data
        if data is None or MODE.trace is not None:
            return OPS.stop_gradient(self)
        return Tensor._new(None, (), self.cached_data, False)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array, which shares the tensor's memory."""
        return self.realize_cached_data().view

    def item(self) -> Any:
        """The only element, as a Python number."""
        expect(self.size == 1, f"item: expected a tensor of one element; received {self.shape}")
        return self.numpy().item()

    def tolist(self) -> Any:
        return self.numpy().tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.realize_cached_data().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.realize_cached_data().__dlpack_device__()

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (type(self), self.realize_cached_data(), self.requires_grad)

    def __deepcopy__(self, memo: Any) -> Tensor:
        received = "received one with history; copy its .data instead"
        expect(self.op is None, f"deepcopy: expected a leaf tensor; {received}")
        return rebuild(type(self), self.realize_cached_data().copy(), self.requires_grad)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len: expected a tensor with axes; received a scalar")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __bool__(self) -> bool:
        received = f"received shape {self.shape}; use any() or all()"
        expect(self.size == 1, f"bool: expected a tensor of one element; {received}")
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.dtype in FLOATS:
            raise TypeError(f"index: expected an integer tensor; received {self.dtype}")
        return int(self.item())

    def __repr__(self) -> str:
        if MODE.trace is not None:
            return f"Tensor(traced, {self.dtype}{list(self.shape)})"
        values = np.array2string(
            self.numpy(), separator=", ", prefix="Tensor(", threshold=100, edgeitems=3
        )
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({values}, dtype={self.dtype}, device={self.device}{grad})"

    def __str__(self) -> str:
        return self.__repr__()

    # Gradients

    def retain_grad(self) -> None:
        """Ask backward to give this tensor a `.grad` with history, as a leaf has, though an op made
        it."""
        RETAINED.add(self)

    def backward(self, out_grad: Any = None) -> None:
        """Set `.grad` of every tensor below to the gradient of (this * out_grad).sum(); out_grad is
        ones by default.

        `.grad` is overwritten, not added to. A leaf's has history, so that it can be differentiated
        again; that of an op's result is a value alone, unless `retain_grad` asked for history.
        Under `ndl.no_grad()` only leaves get one, without history; in lazy mode, only leaves.
        """
        expect(self.requires_grad, "backward: expected a tensor with history; received one without")
        if out_grad is None:
            ones = np.ones(self.shape, self.dtype)
            out_grad = Tensor.make_const(NDArray.wrap(ones, self.device))
        else:
            if not isinstance(out_grad, Tensor):
                out_grad = Tensor.make_const(NDArray(out_grad, self.device, self.dtype))
            shapes = f"{self.shape}; received {out_grad.shape}"
            fits = out_grad.shape == self.shape
            expect(fits, f"backward: expected out_grad of shape {shapes}")
            out_grad = OPS.astype(out_grad, self.dtype)
        if MODE.trace is not None:
            MODE.trace.ran_backward = True
        compute_gradient_of_variables(self, out_grad)
        if Hooks.backward is not None:
            Hooks.backward()

    # Operators and methods that are functions of needle.ops, which sets them (METHODS there)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __pow__ = __rpow__ = unregistered
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = unregistered
    __matmul__ = __rmatmul__ = __neg__ = __abs__ = __invert__ = unregistered
    __and__ = __or__ = __xor__ = __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = unregistered
    matmul = sum = mean = var = std = max = min = prod = any = all = argmax = argmin = unregistered
    cumsum = flatten = squeeze = unsqueeze = exp = log = sqrt = tanh = relu = abs = unregistered
    clip = astype = unregistered

    def reshape(self, *shape: Any) -> Tensor:
        return OPS.reshape(self, shape[0] if len(shape) == 1 else shape)

    def broadcast_to(self, *shape: Any) -> Tensor:
        return OPS.broadcast_to(self, shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: Any) -> Tensor:
        return OPS.transpose(self, axes[0] if len(axes) == 1 else axes or None)

    def permute(self, *axes: Any) -> Tensor:
        return OPS.permute(
            self, axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        )

    def to(self, target: Any) -> Tensor:
        """The tensor on a device, or in a dtype."""
        return (OPS.to_device if isinstance(target, Device) else OPS.astype)(self, target)


class TensorTuple(Value):
    """The result of an op with several results: an immutable sequence of Tensors."""

    __slots__ = ()

    cached_data: tuple[NDArray, ...]

    @staticmethod
    def make_from_op(op: Op, inputs: Sequence[Any]) -> TensorTuple:
        found = replay(op, inputs)
        return make_general(TensorTuple, op, as_values(inputs)) if found is None else found

    def __len__(self) -> int:
        return len(self.spec if self.cached_data is None else self.cached_data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"TensorTuple: expected an index below {size}; received {index}")
        return OPS.tuple_get_item(self, index % size)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def tuple(self) -> Any:
        return tuple(self)

    def numpy(self) -> Any:
        return tuple(data.view for data in self.realize_cached_data())

    def __add__(self, other: TensorTuple) -> TensorTuple:
        fits = isinstance(other, TensorTuple) and len(other) == len(self)
        expect(fits, "add: expected two TensorTuples of one length")
        return OPS.make_tuple(*(a + b for a, b in zip(self, other, strict=True)))

    def detach(self) -> TensorTuple:
        data: Any = self.cached_data
        if data is None:
            return OPS.make_tuple(*[each.detach() for each in self])
        return TensorTuple._new(None, (), data, False)

    def __repr__(self) -> str:
        return f"TensorTuple{self.tuple()}"


def rebuild(kind: type[Tensor], data: NDArray, requires_grad: bool) -> Tensor:
    """A leaf of a class from its parts (copying, pickling)."""
    return kind._new(None, (), data, requires_grad)


def announce(value: Any) -> Any:
    """A node was made, and computed at once."""
    if Hooks.create is not None:
        Hooks.create(value)
    settle(value)
    return value


def settle(value: Any) -> None:
    """A node is computed: drop the history that it does not need."""
    if Hooks.node is not None:
        Hooks.node(value)
    if not value.requires_grad:
        value.op, value.inputs = None, ()


def spec_of(value: Value) -> Any:
    """The Spec of a node, or of each item of a TensorTuple."""
    data = value.cached_data
    if data is None:
        return value.spec
    return tuple(each.spec for each in data) if type(data) is tuple else data.spec


def as_values(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The inputs of an op, arrays among them as constants."""
    return tuple(x if isinstance(x, Value) else Tensor.make_const(x) for x in inputs)


def make_general(kind: Any, op: Op, inputs: tuple[Any, ...], spec: Any = None) -> Any:
    """The node of an op on whatever values: lazy ones, tuples; the first with such operands."""
    if MODE.autocast is not None:
        inputs = OPS.cast_operands(op, inputs)
    if is_lazy():
        spec = op.infer(*flattened([spec_of(x) for x in inputs])) if spec is None else spec
        return kind.make_pending(op, inputs, spec)
    arrays = flattened([x.realize_cached_data() for x in inputs])
    requires_grad = any(x.requires_grad for x in inputs)
    if op.is_builtin:
        plan = plan_for(op, arrays, spec)
        return make_node(op, inputs, plan, plan.call(*arrays), requires_grad)
    found = evaluate(op, arrays, spec)
    floats = any(each.form.is_float for each in flattened([found]))
    kind = TensorTuple if type(found) is tuple else Tensor
    return announce(kind._new(op, inputs, found, MODE.grad and floats and requires_grad))


# Reverse mode


def find_topo_sort(node_list: Sequence[Value]) -> list[Value]:
    """All nodes below the given ones, each after its inputs, in post-order depth-first order."""
    return post_order(node_list, lambda node: node.inputs)


def post_order(
    roots: Iterable[Any], inputs: Callable[[Any], Sequence[Any]], known: Iterable[Any] = ()
) -> list[Any]:
    """The roots and all below them, each after its inputs, depth first and without recursion.
    known: what is left out, and where the walk stops."""
    order: list[Any] = []
    visited = set(known)
    for root in roots:
        if root in visited:
            continue
        visited.add(root)
        stack = [(root, iter(inputs(root)))]
        while stack:
            node, rest = stack[-1]
            for x in rest:
                if x not in visited:
                    visited.add(x)
                    stack.append((x, iter(inputs(x))))
                    break
            else:
                order.append(node)
                stack.pop()
    return order


def pending_inputs(value: Any) -> Sequence[Any]:
    """What a Value that is not computed reads: Values, and arrays; nothing of all else."""
    if isinstance(value, Value) and value.cached_data is None and value.operands is not None:
        return value.operands
    return ()


def inputs_with_gradient(node: Value) -> list[Value]:
    return [x for x in node.inputs if x.requires_grad]


def compute_gradient_of_variables(output_tensor: Value, out_grad: Value) -> None:
    """Reverse mode: set `.grad` of every value below output_tensor that requires a gradient.

    Nodes are visited in reverse topological order; each node's adjoint is the sum of what its
    consumers passed down. Where a gradient rule raises, no `.grad` has changed. Gradient rules run
    in the dtypes of their nodes, without autocast.
    """
    if MODE.autocast is not None:
        with mode(autocast=None):
            compute_gradient_of_variables(output_tensor, out_grad)
        return
    order = post_order([output_tensor], inputs_with_gradient)
    found: list[tuple[Value, Any]] = []
    for node, adjoint in reverse(order, {output_tensor: [out_grad]}):
        if adjoint is not None:
            found.append((node, kept_gradient(node, adjoint)))
        elif node.op is None and not MODE.tracing:  # only steps, as floor and sign, read it
            zeros = NDArray.wrap(np.zeros(node.shape, node.dtype), node.device)
            found.append((node, Tensor.make_const(zeros)))
    for node, grad in found:
        if MODE.trace is not None:
            MODE.trace.meet_gradient(node)
        node._grad = grad


def parts_below(
    outputs: Sequence[Value], out_grads: Sequence[Value], ends: Collection[Value]
) -> dict[Value, list[Any]]:
    """The parts of which the adjoints of `ends`, values below the outputs, are the sums. Only what
    depends on them is differentiated, nothing below them, and no `.grad` is set."""
    seeds: dict[Value, Any] = {}
    for y, out_grad in zip(outputs, out_grads, strict=True):
        seeds.setdefault(y, []).append(out_grad)
    order = post_order(outputs, lambda x: () if x in ends else inputs_with_gradient(x))
    nodes: set[Value] = set()
    for node in order:
        if node in ends or not nodes.isdisjoint(node.inputs):
            nodes.add(node)
    order = [node for node in order if node in nodes]
    with mode(autocast=None):
        return {x: parts for x, parts in reverse(order, seeds, ends) if x in ends and parts}


def reverse(
    order: list[Any], partials: dict[Value, Any], ends: Collection[Value] = ()
) -> Iterator[tuple[Any, Any]]:
    """(node, its adjoint, None where there is none) of nodes in topological order, last first.
    partials: the parts of adjoints so far. The walk stops at `ends`: the parts of theirs."""
    nodes = set(order)
    before = MODE.backward_of
    try:
        while order:
            node = order.pop()
            parts = partials.pop(node, None)
            if parts is None or node in ends:
                yield node, parts
                continue
            MODE.backward_of = node
            adjoint = tuple_gradient(node, parts) if type(parts) is dict else add_partials(parts)
            yield node, adjoint
            if node.op is not None:
                pass_down(node, adjoint, partials, nodes)
    finally:
        MODE.backward_of = before


def kept_gradient(node: Value, out_grad: Any) -> Any:
    """What a node's `.grad` will hold. An op's result holds the value alone: its history would lead
    back to the node, and such a cycle outlives the step. Under no_grad() it holds none, so that the
    memory goes back at once; nor does it in lazy mode, where there is no value yet."""
    if node.op is None or node in RETAINED:
        return out_grad
    if not MODE.grad or MODE.tracing or not isinstance(node, Tensor):
        return None
    return out_grad.cached_data


def pass_down(node: Value, out_grad: Any, partials: dict[Value, Any], nodes: set[Value]) -> None:
    """Add a node's contributions to the adjoints of those of its inputs that are in nodes."""
    op: Any = node.op
    if op.item is not None:
        partials.setdefault(node.inputs[0], {}).setdefault(op.item, []).append(out_grad)
        return
    for x, part in zip(node.inputs, op.gradient_as_tuple(out_grad, node), strict=True):
        if part is not None and x in nodes:
            known = partials.setdefault(x, [])
            if type(known) is dict:
                for index, each in enumerate(part):
                    known.setdefault(index, []).append(each)
            elif type(part) is list:  # of a checkpoint: summed with the rest, in the same order
                known.extend(part)
            else:
                known.append(part)


def add_partials(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else reduce(operator.add, parts)


def tuple_gradient(node: Value, parts: dict[int, list[Tensor]]) -> Any:
    """The adjoint of a TensorTuple from those of its items; items that nobody read have zeros."""
    if node.op is not None and node.op.sees_missing:
        return [add_partials(parts[i]) if i in parts else None for i in range(len(spec_of(node)))]
    device = next(iter(parts.values()))[0].device
    zeros = [NDArray.wrap(np.zeros(spec.shape, spec.dtype), device) for spec in spec_of(node)]
    sums = {index: add_partials(each) for index, each in parts.items()}
    return OPS.make_tuple(*[sums.get(i, Tensor.make_const(zero)) for i, zero in enumerate(zeros)])
