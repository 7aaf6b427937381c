"""The course's NumPy backend: its names for the devices, for code that imports them from here."""

from __future__ import annotations

from needle.backend.device import Device, all_devices, cpu, cpu_numpy, default_device
