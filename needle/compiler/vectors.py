"""Typed instructions as LLVM IR text: what emit.py's loops are made of.

A value is the name of an SSA register; its type follows from a dtype and a number of lanes, 0 for a
scalar. In registers bool is i1, and float16 and bfloat16 are their bits in an i16: nothing is
computed in them. In memory bool is a byte. The text is final, as no optimisation pipeline runs:
no flag may change a bit, and `fma` is fused because it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from needle.dtype import LOW_PRECISION, DType, bool_, float16, float32, float64, int32, int64, uint8

uint32 = np.dtype(np.uint32)
uint64 = np.dtype(np.uint64)

REGISTERS = {bool_: "i1", float32: "float", float64: "double"}
SUFFIX = {"float": "f32", "double": "f64", "half": "f16", "ptr": "p0"}
FLOAT = {
    "add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv", "frem": "frem", "neg": "fneg",
    "fma": "@fma", "abs": "@fabs", "sqrt": "@sqrt", "floor": "@floor", "ceil": "@ceil",
    "rint": "@roundeven", "trunc": "@trunc", "max": "@maximum", "min": "@minimum",
}  # fmt: skip
SIGNED = {"max": "@smax", "min": "@smin"}
UNSIGNED = {"max": "@umax", "min": "@umin"}
FLOAT_RELATION = {"lt": "olt", "le": "ole", "eq": "oeq", "ne": "une"}
SIGNED_RELATION = {"lt": "slt", "le": "sle", "eq": "eq", "ne": "ne"}
UNSIGNED_RELATION = {"lt": "ult", "le": "ule", "eq": "eq", "ne": "ne"}

Carried = list[tuple[str, str]]  # (LLVM type, value) of what a loop hands from turn to turn


def register(dtype: DType) -> str:
    """The LLVM type of a scalar in a register."""
    if dtype in LOW_PRECISION:
        return "i16"
    return REGISTERS.get(dtype) or f"i{8 * dtype.itemsize}"


def memory(dtype: DType) -> str:
    return "i8" if dtype == bool_ else register(dtype)


def wide(kind: str, lanes: int) -> str:
    return f"<{lanes} x {kind}>" if lanes else kind


def typed(dtype: DType, lanes: int) -> str:
    return wide(register(dtype), lanes)


def suffix(kind: str, lanes: int) -> str:
    """How the name of an intrinsic spells a type."""
    return f"v{lanes}{SUFFIX.get(kind, kind)}" if lanes else SUFFIX.get(kind, kind)


def literal(value: np.ndarray, lanes: int) -> str:
    """A constant; floats by their bits as float64, as LLVM spells them."""
    dtype = value.dtype
    if dtype == bool_:
        text = "true" if value else "false"
    elif dtype in LOW_PRECISION:
        text = str(value.view(np.int16).item())
    elif dtype.kind == "f":
        text = f"0x{np.asarray(value, float64).view(uint64).item():016X}"
    else:
        text = str(value.item())
    return f"splat ({register(dtype)} {text})" if lanes else text


def constant(value: float, dtype: DType, lanes: int) -> str:
    return literal(np.asarray(value, dtype), lanes)


def least(dtype: DType) -> float:
    """What max begins with."""
    if dtype.kind == "b":
        return 0
    return -np.inf if dtype.kind == "f" else int(np.iinfo(dtype).min)


def most(dtype: DType) -> float:
    if dtype.kind == "b":
        return 1
    return np.inf if dtype.kind == "f" else int(np.iinfo(dtype).max)


def count_from(kind: str, start: int, lanes: int) -> str:
    return f"<{', '.join(f'{kind} {start + n}' for n in range(lanes))}>"


class Writer:
    """A function's text as it grows: values get names, loops know their phis."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0
        self.block = "entry"

    def fresh(self) -> int:
        self.count += 1
        return self.count

    def do(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def let(self, text: str) -> str:
        name = f"%v{self.fresh()}"
        self.lines.append(f"  {name} = {text}")
        return name

    def begin(self, block: str) -> None:
        self.lines.append(f"{block}:")
        self.block = block

    def whole(self, op: str, a: object, b: object) -> str:
        """Arithmetic on scalar int64."""
        if (op, str(b)) in (("add", "0"), ("mul", "1")):
            return str(a)
        if (op, str(a)) == ("add", "0") or (op, str(b)) == ("mul", "0"):
            return str(b)
        return self.let(f"{op} i64 {a}, {b}")

    def test(self, relation: str, a: object, b: object) -> str:
        return self.let(f"icmp {relation} i64 {a}, {b}")

    def least_of(self, a: object, b: object) -> str:
        return self.let(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")

    def repeat(
        self,
        start: Carried,
        more: Callable[[list[str]], str],
        turn: Callable[[list[str]], list[str]],
    ) -> list[str]:
        """values = start; while more(values): values = turn(values); return values"""
        before, number = self.block, self.fresh()
        head, body, after = (f"{stem}{number}" for stem in ("head", "body", "after"))
        self.do(f"br label %{head}")
        self.begin(head)
        values = [f"%v{self.fresh()}" for _ in start]
        phis = len(self.lines)
        self.do(f"br i1 {more(values)}, label %{body}, label %{after}")
        self.begin(body)
        following = turn(values)
        self.lines[phis:phis] = [
            f"  {value} = phi {kind} [{first}, %{before}], [{each}, %{self.block}]"
            for value, (kind, first), each in zip(values, start, following, strict=True)
        ]
        self.do(f"br label %{head}")
        self.begin(after)
        return values

    def loop(
        self,
        start: object,
        stop: object,
        step: object,
        carried: Carried,
        turn: Callable[[str, list[str]], list[str]],
    ) -> list[str]:
        """for i in range(start, stop, step): carried = turn(i, carried)"""

        def body(values: list[str]) -> list[str]:
            following = turn(values[0], values[1:])
            return [self.whole("add", values[0], step), *following]

        first = [("i64", str(start)), *carried]
        return self.repeat(first, lambda values: self.test("slt", values[0], stop), body)[1:]

    def each(self, start: object, stop: object, turn: Callable[[str], None]) -> None:
        """for i in range(start, stop): turn(i)"""

        def body(i: str, _: list[str]) -> list[str]:
            turn(i)
            return []

        self.loop(start, stop, 1, [], body)

    def when(self, condition: str, then: Callable[[], None]) -> None:
        number = self.fresh()
        self.do(f"br i1 {condition}, label %then{number}, label %after{number}")
        self.begin(f"then{number}")
        then()
        self.do(f"br label %after{number}")
        self.begin(f"after{number}")

    # Values

    def call(self, name: str, kind: str, lanes: int, args: Sequence[str]) -> str:
        """An intrinsic whose arguments have the type of its result."""
        type_ = wide(kind, lanes)
        parts = ", ".join(f"{type_} {x}" for x in args)
        return self.let(f"call {type_} @llvm.{name}.{suffix(kind, lanes)}({parts})")

    def splat(self, x: str, dtype: DType, lanes: int) -> str:
        return self.spread_out(x, register(dtype), lanes)

    def spread_out(self, x: str, kind: str, lanes: int) -> str:
        """The same in all lanes."""
        vector, places = wide(kind, lanes), f"<{lanes} x i32> zeroinitializer"
        one = self.let(f"insertelement {vector} poison, {kind} {x}, i64 0")
        return self.let(f"shufflevector {vector} {one}, {vector} poison, {places}")

    def lane(self, x: str, dtype: DType, lanes: int, place: str = "i64 0") -> str:
        return self.let(f"extractelement {typed(dtype, lanes)} {x}, {place}")

    def any_lane(self, mask: str, lanes: int) -> tuple[str, str]:
        """(whether a mask is true somewhere, its bits as an integer)"""
        bits = self.convert("bitcast", mask, f"<{lanes} x i1>", f"i{lanes}", 0)
        return self.let(f"icmp ne i{lanes} {bits}, 0"), bits

    def half(self, x: str, dtype: DType, lanes: int, start: int) -> str:
        """Half of a vector, from a lane on."""
        kind = typed(dtype, lanes)
        places = f"<{lanes // 2} x i32> {count_from('i32', start, lanes // 2)}"
        return self.let(f"shufflevector {kind} {x}, {kind} poison, {places}")

    def count_up(self, start: object, lanes: int, dtype: DType = int64) -> str:
        """start, start + 1, ... in the lanes."""
        kind = register(dtype)
        if isinstance(start, int):
            return count_from(kind, start, lanes)
        first = self.splat(str(start), dtype, lanes)
        return self.let(f"add {wide(kind, lanes)} {first}, {count_from(kind, 0, lanes)}")

    def select(self, condition: str, a: str, b: str, dtype: DType, lanes: int) -> str:
        kind, bits = typed(dtype, lanes), wide("i1", lanes)
        return self.let(f"select {bits} {condition}, {kind} {a}, {kind} {b}")

    def arithmetic(self, op: str, dtype: DType, lanes: int, args: Sequence[str]) -> str:
        """An op of loops.ARITHMETIC."""
        kind = register(dtype)
        if dtype.kind == "f":
            found = FLOAT[op]
        elif op == "neg":
            return self.arithmetic("sub", dtype, lanes, [constant(0, dtype, lanes), *args])
        elif op == "not":
            ones = np.asarray(True) if dtype == bool_ else ~np.zeros((), dtype)
            return self.arithmetic("xor", dtype, lanes, [*args, literal(ones, lanes)])
        elif op == "abs":
            type_ = wide(kind, lanes)
            name = f"@llvm.abs.{suffix(kind, lanes)}"
            return self.let(f"call {type_} {name}({type_} {args[0]}, i1 false)")
        else:
            found = (SIGNED if dtype.kind == "i" else UNSIGNED).get(op, op)
        if found[0] == "@":
            return self.call(found[1:], kind, lanes, args)
        return self.let(f"{found} {wide(kind, lanes)} {', '.join(args)}")

    def compare(self, op: str, dtype: DType, lanes: int, a: str, b: str) -> str:
        if dtype.kind == "f":
            relation = f"fcmp {FLOAT_RELATION[op]}"
        else:
            relation = f"icmp {(SIGNED_RELATION if dtype.kind == 'i' else UNSIGNED_RELATION)[op]}"
        return self.let(f"{relation} {typed(dtype, lanes)} {a}, {b}")

    # Conversions

    def convert(self, op: str, x: str, source: str, target: str, lanes: int) -> str:
        if source == target:
            return x
        return self.let(f"{op} {wide(source, lanes)} {x} to {wide(target, lanes)}")

    def cast(self, x: str, source: DType, target: DType, lanes: int) -> str:
        """x in another dtype; the low-precision ones by way of float32."""
        if source in LOW_PRECISION:
            return self.cast(self.widen(x, source, lanes), float32, target, lanes)
        if target in LOW_PRECISION:
            if source == float64 and target == float16:
                x = self.round_to_odd(x, lanes)
            else:
                x = self.cast(x, source, float32, lanes)
            return self.narrow(x, target, lanes)
        if target == bool_:
            return self.compare("ne", source, lanes, x, constant(0, source, lanes))
        if source.kind == "f" and target.kind != "f":
            return self.saturate(x, source, target, lanes)
        op = conversion(source, target)
        return self.convert(op, x, register(source), register(target), lanes)

    def saturate(self, x: str, source: DType, target: DType, lanes: int) -> str:
        """A float as an integer. LLVM's own fptosi.sat is not vectorised for x86; what is outside
        the range is kept from the instruction, as it would raise a flag."""
        bounds, zero = np.iinfo(target), constant(0, source, lanes)
        ends = (("olt", bounds.min, bounds.min), ("oge", float(bounds.max) + 1, bounds.max))
        near = self.select(self.compare("eq", source, lanes, x, x), x, zero, source, lanes)
        tests = []
        for relation, end, _ in ends:
            bound = constant(float(end), source, lanes)
            tests.append(self.let(f"fcmp {relation} {typed(source, lanes)} {x}, {bound}"))
            near = self.select(tests[-1], zero, near, source, lanes)
        op = "fptosi" if target.kind == "i" else "fptoui"
        found = self.convert(op, near, register(source), register(target), lanes)
        for outside, (_, _, value) in zip(tests, ends, strict=True):
            found = self.select(outside, constant(value, target, lanes), found, target, lanes)
        return found

    def widen(self, x: str, source: DType, lanes: int) -> str:
        """float16 or bfloat16 as float32."""
        if source == float16:
            return self.convert("fpext", self.convert("bitcast", x, "i16", "half", lanes),
                                "half", "float", lanes)  # fmt: skip
        bits = self.convert("zext", x, "i16", "i32", lanes)
        bits = self.arithmetic("shl", uint32, lanes, [bits, constant(16, uint32, lanes)])
        return self.convert("bitcast", bits, "i32", "float", lanes)

    def narrow(self, x: str, target: DType, lanes: int) -> str:
        """float32 as float16 or bfloat16, to nearest even; a NaN stays one."""
        if target == float16:
            return self.convert("bitcast", self.convert("fptrunc", x, "float", "half", lanes),
                                "half", "i16", lanes)  # fmt: skip

        def step(op: str, a: str, b: object) -> str:
            b = constant(b, uint32, lanes) if isinstance(b, int) else str(b)
            return self.arithmetic(op, uint32, lanes, [a, b])

        bits = self.convert("bitcast", x, "float", "i32", lanes)
        high = step("lshr", bits, 16)
        rounded = step("lshr", step("add", step("add", bits, 0x7FFF), step("and", high, 1)), 16)
        nan = self.compare("ne", float32, lanes, x, x)
        found = self.select(nan, step("or", high, 0x40), rounded, uint32, lanes)
        return self.convert("trunc", found, "i32", "i16", lanes)

    def round_to_odd(self, x: str, lanes: int) -> str:
        """float64 as a float32 that rounds to the float16 nearest to x: what is inexact is
        truncated, and its last bit set (Boldo and Melquiond, 2008)."""
        near = self.convert("fptrunc", x, "double", "float", lanes)
        back = self.convert("fpext", near, "float", "double", lanes)
        bits = self.convert("bitcast", near, "float", "i32", lanes)
        sizes = [self.call("fabs", "double", lanes, [each]) for each in (back, x)]
        above = self.compare("lt", float64, lanes, sizes[1], sizes[0])
        down = self.convert("zext", above, "i1", "i32", lanes)
        odd = self.arithmetic("sub", int32, lanes, [bits, down])
        odd = self.arithmetic("or", int32, lanes, [odd, constant(1, int32, lanes)])
        exact = self.let(f"fcmp ueq {wide('double', lanes)} {back}, {x}")
        found = self.select(exact, bits, odd, int32, lanes)
        return self.convert("bitcast", found, "i32", "float", lanes)

    # Memory

    def at(self, pointer: str, index: object, kind: str) -> str:
        if str(index) == "0":
            return pointer
        return self.let(f"getelementptr {kind}, ptr {pointer}, i64 {index}")

    def from_memory(self, x: str, dtype: DType, lanes: int) -> str:
        if dtype != bool_:
            return x
        return self.compare("ne", uint8, lanes, x, constant(0, uint8, lanes))

    def load(self, pointer: str, dtype: DType, lanes: int, mask: str | None = None) -> str:
        """Elements one after the other; 0 where the mask is false, and nothing is read there."""
        kind, align = wide(memory(dtype), lanes), f"align {dtype.itemsize}"
        if mask is None:
            return self.from_memory(self.let(f"load {kind}, ptr {pointer}, {align}"), dtype, lanes)
        name = f"llvm.masked.load.{suffix(memory(dtype), lanes)}.p0"
        rest = f"<{lanes} x i1> {mask}, {kind} zeroinitializer"
        found = self.let(f"call {kind} @{name}(ptr {align} {pointer}, {rest})")
        return self.from_memory(found, dtype, lanes)

    def store(
        self, x: str, pointer: str, dtype: DType, lanes: int, mask: str | None = None
    ) -> None:
        kind, align = wide(memory(dtype), lanes), f"align {dtype.itemsize}"
        x = self.convert("zext", x, register(dtype), memory(dtype), lanes)
        if mask is None:
            return self.do(f"store {kind} {x}, ptr {pointer}, {align}")
        name = f"llvm.masked.store.{suffix(memory(dtype), lanes)}.p0"
        rest = f"ptr {align} {pointer}, <{lanes} x i1> {mask}"
        return self.do(f"call void @{name}({kind} {x}, {rest})")

    def addresses(self, base: str, index: str, dtype: DType, lanes: int) -> str:
        return self.let(f"getelementptr {memory(dtype)}, ptr {base}, <{lanes} x i64> {index}")

    def each_lane(
        self, base: str, index: str, dtype: DType, lanes: int, mask: str | None
    ) -> Iterator[tuple[int, str]]:
        """The lanes and the addresses of their elements; %sink where the mask is false."""
        kind, found = f"<{lanes} x ptr>", self.addresses(base, index, dtype, lanes)
        if mask is not None:
            sinks = self.spread_out("%sink", "ptr", lanes)
            found = self.let(f"select <{lanes} x i1> {mask}, {kind} {found}, {kind} {sinks}")
        for place in range(lanes):
            yield place, self.let(f"extractelement {kind} {found}, i64 {place}")

    def gather(self, base: str, index: str, dtype: DType, lanes: int, mask: str | None) -> str:
        """Elements at indices: one instruction where there is one, else lane by lane."""
        one, align = memory(dtype), f"align {dtype.itemsize}"
        kind, bits = wide(one, lanes), f"<{lanes} x i1>"
        if lanes == 16 and dtype.itemsize >= 4:
            places = self.addresses(base, index, dtype, lanes)
            rest = f"{bits} {mask or 'splat (i1 true)'}, {kind} zeroinitializer"
            name = f"llvm.masked.gather.{suffix(one, lanes)}.v{lanes}p0"
            return self.let(f"call {kind} @{name}(<{lanes} x ptr> {align} {places}, {rest})")
        found = "poison"
        for place, pointer in self.each_lane(base, index, dtype, lanes, mask):
            x = self.let(f"load {one}, ptr {pointer}, {align}")
            found = self.let(f"insertelement {kind} {found}, {one} {x}, i64 {place}")
        if mask is not None:
            found = self.let(f"select {bits} {mask}, {kind} {found}, {kind} zeroinitializer")
        return self.from_memory(found, dtype, lanes)

    def scatter(
        self, x: str, base: str, index: str, dtype: DType, lanes: int, mask: str | None
    ) -> None:
        """Store lane by lane."""
        kind = memory(dtype)
        x = self.convert("zext", x, register(dtype), kind, lanes)
        for place, pointer in self.each_lane(base, index, dtype, lanes, mask):
            one = self.let(f"extractelement {wide(kind, lanes)} {x}, i64 {place}")
            self.do(f"store {kind} {one}, ptr {pointer}, align {dtype.itemsize}")


def conversion(source: DType, target: DType) -> str:
    """The instruction between two numbers, neither of low precision, not from float to integer."""
    signed = source.kind == "i"
    if target.kind == "f":
        if source.kind == "f":
            return "fpext" if target.itemsize > source.itemsize else "fptrunc"
        return "sitofp" if signed else "uitofp"
    if source == bool_ or target.itemsize > source.itemsize:
        return "sext" if signed else "zext"
    return "trunc"
