"""The machine that code is made for: its processor, how wide vectors are, and a fingerprint of all.

`fingerprint` names everything that machine code depends on besides its own text; cache.py makes it
part of every key. llvmlite is imported at the first use, since most of needle does without it.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import needle
from needle.errors import CompileError, expect

WIDTHS = (128, 256, 512)


@dataclass(frozen=True)
class Target:
    """A processor as LLVM names it, and the width in bits of the vectors that kernels use."""

    triple: str
    cpu: str
    features: str
    vector_bits: int

    @property
    def is_x86(self) -> bool:
        return self.triple.startswith("x86_64")

    @property
    def is_arm(self) -> bool:
        return self.triple.startswith(("aarch64", "arm64"))


@cache
def llvm() -> Any:
    """llvmlite's binding to LLVM, ready for this machine."""
    try:
        binding = import_module("llvmlite.binding")
    except ImportError as error:
        received = f"an environment without it ({error}): pip install llvmlite"
        message = f"llvmlite: expected an installed library; received {received}"
        raise CompileError(message) from None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding


@cache
def host() -> Target:
    """This machine, with vectors of NEEDLE_VECTOR_BITS or of what it has."""
    binding, found = llvm(), {}
    with suppress(RuntimeError):  # LLVM cannot tell on every system
        found = dict(binding.get_host_cpu_features())
    widest = 512 if found.get("avx512f") else 256 if found.get("avx2") else 128
    given = os.environ.get("NEEDLE_VECTOR_BITS") or str(widest)
    expected = f"expected one of {', '.join(map(str, WIDTHS))}"
    message = f"NEEDLE_VECTOR_BITS: {expected}; received {given}; unset it for the widest"
    expect(given in map(str, WIDTHS), message)
    features = ",".join(feature(name, on, int(given)) for name, on in sorted(found.items()))
    triple = binding.get_process_triple()
    return Target(triple, binding.get_host_cpu_name(), features, int(given))


def feature(name: str, on: bool, bits: int) -> str:
    """A feature for LLVM: below 512 bits without AVX-512, always with AVX2's and fused
    multiply-add's instructions, which have forms for 128 bits too."""
    wide = name.startswith(("avx512", "avx10", "amx-avx512"))
    return f"{'+' if on and (bits == 512 or not wide) else '-'}{name}"


def vector_bits() -> int:
    """How wide vectors are: 128, 256 or 512 bits."""
    return host().vector_bits


@cache
def cache_size() -> int:
    """Bytes of a core's level 2 cache; a common size where the system does not tell."""
    with suppress(OSError, ValueError):  # Linux; elsewhere the name is unknown
        found = os.sysconf("SC_LEVEL2_CACHE_SIZE")
        if found > 0:
            return found
    with suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    return 1 << 20


@cache
def fingerprint() -> str:
    """All that compiled code depends on: needle's sources, LLVM's version, the CPU and flags."""
    target, sources = host(), hashlib.sha256(needle.__version__.encode())
    for pattern in ("**/*.py", "compiler/*.ll"):
        for path in sorted(Path(__file__).parent.parent.glob(pattern)):
            sources.update(path.read_bytes())
    llvm_version = ".".join(map(str, llvm().llvm_version_info))
    parts = (sources.hexdigest(), llvm_version, target.triple, target.cpu, target.features)
    return "\n".join((*parts, str(target.vector_bits), str(cache_size())))
