"""The device cpu(): an op is computed by a kernel that the compiler makes for it.

An op on operands of given forms is planned once: as a view where NumPy finds that the result can
be one, else as a program of the compiler, which takes addresses. Ops that have no kernel, and a
user's own, are computed by NumPy. What all plans are: functions of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from needle.array.form import Form, compact_form, form_of
from needle.array.ndarray import NDArray, address, empty
from needle.backend.device import DEVICES, Device
from needle.backend.numpy import NumpyDevice, compute
from needle.dtype import FLOATS, DType

Call = Callable[..., Any]
UINT8: DType = np.dtype(np.uint8)


class CompiledDevice(NumpyDevice):
    """Host memory, and kernels compiled for this processor."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: dict[tuple[Any, ...], Call | None] = {}  # by op and operands' forms

    def plan(self, op: Any, arrays: Sequence[NDArray], spec: Any) -> Call:
        call = view_call(op, arrays, self) if op.moves else None
        if call is not None:
            return call
        pair = op.with_operand(spec)
        if pair is not None:
            number = NDArray(as_array(pair[1], spec.dtype), self)
            with_number = self.plan(pair[0], (*arrays, number), spec)
            return lambda x: with_number(x, number)
        return self.compiled(op, arrays, spec) or super().plan(op, arrays, spec)

    def compiled(self, op: Any, arrays: Sequence[NDArray], spec: Any) -> Call | None:
        """A function of arrays that calls the compiler's program, None for an op without one."""
        forms = [array.form for array in arrays]
        if getattr(op, "is_elementwise", False):
            forms = [form.spread(spec.shape) for form in forms]
        key = (op, *forms)
        if key not in self.calls:
            if len(self.calls) >= 4096:
                self.calls.clear()
            program = compiler().eager_plan(op, forms)
            count, several = len(forms), type(spec) is tuple
            self.calls[key] = program and program_call(program, count, several, self)
        return self.calls[key]


def as_array(number: float, dtype: DType) -> np.ndarray:
    """A number as an array; an infinite one where the dtype cannot hold it."""
    with np.errstate(all="ignore"):
        return np.asarray(float(number) if dtype in FLOATS else number).astype(dtype)


@cache
def compiler() -> Any:
    """The compiler, which reads ops and so cannot be imported before them."""
    return import_module("needle.compiler.compile")


# Views


def view_call(op: Any, arrays: Sequence[NDArray], device: Device) -> Call | None:
    """A movement op as views of its operands, None where its result is a copy."""
    views = [array.view[...] for array in arrays]
    found = compute(op, views, None)
    several = type(found) is tuple
    parts = [place_of(each, views, device) for each in (found if several else (found,))]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if several:
        return lambda *arrays: tuple([NDArray.at(arrays[n], *place) for n, place in known])
    number, (offset, form) = known[0]
    if len(arrays) > 1:
        return lambda *arrays: NDArray.at(arrays[number], offset, form)
    at = NDArray.at
    return lambda x: at(x, offset, form)


def place_of(
    view: np.ndarray, views: Sequence[np.ndarray], device: Device
) -> tuple[int, tuple[int, Form]] | None:
    """Of which operand a result is a view, how far from its first element in bytes, and in which
    form. Of several operands a result can only be one as it is: how far they lie from one another
    is no part of a plan."""
    for number, x in enumerate(views):
        if view is x:
            return number, (0, form_of(view, device))
    if len(views) == 1 and np.may_share_memory(view, views[0]):
        return 0, (address(view) - address(views[0]), form_of(view, device))
    return None


# Programs


def program_call(program: Any, count: int, several: bool, device: Device) -> Call:
    """A function of arrays that runs a program: on their addresses, those of new outputs, and that
    of its arena where it needs one."""
    run, refuse = program.native.run, program.refuse
    forms = [compact_form(device, spec.shape, spec.dtype) for spec in program.specs]
    if several or program.arena:
        arena = [compact_form(device, (program.arena,), UINT8)] if program.arena else []
        return general_call(run, refuse, forms, arena, several)
    make = {1: unary_call, 2: binary_call}.get(count, nary_call)
    return make(run, refuse, forms[0])


def unary_call(run: Call, refuse: Call, form: Form) -> Call:
    def call(x: NDArray) -> NDArray:
        found = empty(form)
        failed = run(x.ptr, found.ptr)
        if failed:
            refuse(*failed)
        return found

    return call


def binary_call(run: Call, refuse: Call, form: Form) -> Call:
    def call(x: NDArray, y: NDArray) -> NDArray:
        found = empty(form)
        failed = run(x.ptr, y.ptr, found.ptr)
        if failed:
            refuse(*failed)
        return found

    return call


def nary_call(run: Call, refuse: Call, form: Form) -> Call:
    def call(*arrays: NDArray) -> NDArray:
        found = empty(form)
        failed = run(*[x.ptr for x in arrays], found.ptr)
        if failed:
            refuse(*failed)
        return found

    return call


def general_call(
    run: Call, refuse: Call, forms: Sequence[Form], arena: Sequence[Form], several: bool
) -> Call:
    def call(*arrays: NDArray) -> Any:
        found = [empty(form) for form in forms]
        memory = [empty(form) for form in arena]
        failed = run(*[x.ptr for x in (*arrays, *found, *memory)])
        if failed:
            refuse(*failed)
        return tuple(found) if several else found[0]

    return call


DEVICES["cpu"] = CompiledDevice("cpu")
