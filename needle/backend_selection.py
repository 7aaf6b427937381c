"""What NEEDLE_BACKEND selects, under the course's names.

    NEEDLE_BACKEND=nd (the default)    the device cpu(); array_api is needle.backend_ndarray
    NEEDLE_BACKEND=np                  the device cpu_numpy(); array_api is NumPy

ValueError for any other value. `cached_data` is an NDArray with both.
"""

from __future__ import annotations

import os
from types import ModuleType

import numpy

from needle import backend_ndarray
from needle.array.ndarray import NDArray
from needle.backend.device import Device, all_devices, cpu, cpu_numpy, cuda, default_device

default_device()  # refuses an unknown NEEDLE_BACKEND
BACKEND = os.environ.get("NEEDLE_BACKEND", "nd")
array_api: ModuleType = numpy if BACKEND == "np" else backend_ndarray
