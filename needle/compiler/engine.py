"""LLVM IR text in, addresses of machine code out.

The text, made for target.py's machine and its `vector_bits`, is final: no optimisation pipeline
runs, only code generation. A kernel is looked up in this process's table, then on disk (cache.py),
and only then compiled: in threads, since LLVM runs without Python's lock. What is loaded stays
loaded. runtime.py runs it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from itertools import count
from typing import Any

from needle.compiler import cache as disk
from needle.compiler.target import host, llvm
from needle.errors import CompileError

MakeText = Callable[[str], str]  # from a function's name to a module that defines it

ADDRESSES: dict[str, int] = {}  # of every kernel that this process has loaded, by key
MACHINES: list[Any] = []  # idle code generators; each serves one thread at a time
LIBRARIES = count()


def make_machine() -> Any:
    """A code generator. Small, position-independent code may lie anywhere in memory."""
    target = host()
    return llvm().Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=2, reloc="pic", codemodel="small", jit=True
    )  # fmt: skip


@cache
def emitter() -> Any:
    """LLVM's code generator as a C function, which threads may call at once.

    llvmlite's own wrapper holds one lock for all threads: 30 kernels in 108 ms instead of 57.
    """
    ffi = llvm().ffi
    wrapped = ffi.lib.LLVMPY_TargetMachineEmitToMemory
    function = ctypes.CDLL(ffi.lib._name).LLVMPY_TargetMachineEmitToMemory
    function.argtypes, function.restype = wrapped.argtypes, wrapped.restype
    return function


def compile_ir(text: str) -> bytes:
    """The object code of a module of LLVM IR; CompileError where LLVM refuses it."""
    binding = llvm()
    ffi = binding.ffi
    try:
        module = binding.parse_assembly(text, context=binding.create_context())
        module.verify()
    except RuntimeError as error:
        raise CompileError(refusal(str(error))) from None
    machine = MACHINES.pop() if MACHINES else make_machine()
    with ffi.OutputString() as reason:
        buffer = emitter()(machine, module, 1, reason)
        if not buffer:
            raise CompileError(refusal(str(reason)))
    MACHINES.append(machine)
    try:
        size = ffi.lib.LLVMPY_GetBufferSize(buffer)
        return ctypes.string_at(ffi.lib.LLVMPY_GetBufferStart(buffer), size)
    finally:
        ffi.lib.LLVMPY_DisposeMemoryBuffer(buffer)


def assembly(text: str) -> str:
    """What `compile_ir` makes of a module, as assembly for people to read."""
    return str(make_machine().emit_assembly(llvm().parse_assembly(text)))


def refusal(reason: str) -> str:
    received = " ".join(reason.split())
    return (
        f"compiler: expected code that LLVM takes; received {received}; a fault of needle: "
        "report it, and use needle.cpu_numpy() meanwhile"
    )


def compile_all(texts: Sequence[str]) -> list[bytes]:
    """The object codes of modules, compiled at once."""
    if len(texts) < 2:
        return [compile_ir(text) for text in texts]
    futures = import_module("concurrent.futures")  # 10 ms that few imports of needle need
    with futures.ThreadPoolExecutor(min(len(texts), os.cpu_count() or 1)) as threads:
        return list(threads.map(compile_ir, texts))


@cache
def linker() -> Any:
    return llvm().create_lljit_compiler(use_jit_link=True, suppress_errors=True)


def load(objects: Iterable[bytes], names: Sequence[str]) -> list[int]:
    """The addresses of functions that some objects define.

    They may call what the process has, such as the C library. Nothing is ever unloaded, even at
    exit, when another thread may still be running in it.
    """
    builder = llvm().JITLibraryBuilder().add_current_process()
    for code in objects:
        builder.add_object_img(code)
    for name in names:
        builder.export_symbol(name)
    try:
        library = builder.link(linker(), f"library{next(LIBRARIES)}")
    except RuntimeError as error:
        raise CompileError(refusal(str(error))) from None
    library.detach()
    return [library[name] for name in names]


def library(key: str, text: str, names: Sequence[str]) -> list[int]:
    """The addresses of functions that one text defines; its key stands for all of it."""
    kept = disk.get("kernel", key)
    code = kept or compile_ir(text)
    found = load([code], names)
    if kept is None:
        disk.put("kernel", key, code)
    return found


def kernel(key: str, make_text: MakeText) -> int:
    """The address of the kernel with a key, which stands for its whole text but for its name."""
    return ADDRESSES.get(key) or kernels([(key, make_text)])[0]


def kernels(wanted: Sequence[tuple[str, MakeText]]) -> list[int]:
    """The addresses of kernels by key; those that are missing are compiled together."""
    missing = {key: make_text for key, make_text in wanted if key not in ADDRESSES}
    kept = {key: disk.get("kernel", key) for key in missing}
    texts = {key: missing[key](symbol(key)) for key, code in kept.items() if code is None}
    made = dict(zip(texts, compile_all(list(texts.values())), strict=True))
    if missing:
        objects = [made.get(key) or kept[key] or b"" for key in missing]
        found = load(objects, [symbol(key) for key in missing])
        ADDRESSES.update(zip(missing, found, strict=True))
        for key, code in made.items():  # none that cannot be loaded
            disk.put("kernel", key, code)
    return [ADDRESSES[key] for key, _ in wanted]


def symbol(key: str) -> str:
    """The name under which a kernel is compiled: the same in every process."""
    return f"kernel_{hashlib.sha256(key.encode()).hexdigest()[:32]}"
