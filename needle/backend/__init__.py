"""Devices: cpu(), the default; cpu_numpy(), the reference; cuda(), none yet. Start at device.py."""

# fmt: off
# isort: off
from needle.backend.device import (
    Device, all_devices, cpu, cpu_numpy, cuda, default_device, find_device,
)
