"""needle: a deep-learning framework in Python, from Tensor to machine code.

    import needle as ndl

Rooms, in reading order: autograd.py, ops/, array/, backend/ (the core); compiler/, capture/, jit.py
(programs); init/, nn/, optim/, data/ (the library); transform.py, recompute.py (gradients as
functions, and with less memory); train/, cli/ (what a user starts); debug.py and memory.py (what to
ask when something is wrong). `backend_ndarray`, `backend_numpy` and `backend_selection` are the
course's import paths.
"""

# fmt: off
# isort: off
from needle.backend import Device, all_devices, cpu, cpu_numpy, cuda, default_device
from needle.backend.compiled import CompiledDevice
from needle.backend.numpy import NumpyDevice
from needle import autograd, backend_ndarray, backend_selection, init, memory, ops
from needle.array.ndarray import NDArray
from needle.autograd import (
    Op, Tensor, TensorOp, TensorTuple, TensorTupleOp, autocast, enable_grad, lazy, no_grad,
)
from needle.dtype import (
    bfloat16, bool_ as bool, float16, float32, float64, int8, int16, int32, int64, uint8,
)
from needle.errors import CompileError, TraceError
from needle.files import load_tensors, save_tensors
from needle.init import ones, ones_like, permutation, rand, randint, randn, seed, zeros, zeros_like
from needle.interchange import from_dlpack, from_numpy
from needle.ops import *  # noqa: F403 - the functions of ops are the package's functions
from needle.ops.contract import get_matmul_precision, set_matmul_precision
from needle import nn  # before capture, which reads Modules: recurrent layers trace
from needle import data, debug, optim
from needle.compiler.runtime import get_num_threads, set_num_threads
from needle.jit import jit
from needle.recompute import checkpoint
from needle.scan import scan
from needle.transform import grad, hessian, hvp, jvp, value_and_grad, vjp
# isort: on
# fmt: on

__version__ = "0.1.0"
