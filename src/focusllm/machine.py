"""The machine and this process: where a number comes from, and the most memory that was held. No torch at import."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor (or GPU), threads and versions, as results keep them."""
    import torch

    return {
        "processor": torch.cuda.get_device_name(device) if device and device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def computes_on_cpu(device: torch.device) -> bool:
    """Whether a model on this device computes on the CPU; one on the meta device will, unless there is a GPU."""
    import torch

    return device.type == "cpu" or (device.type == "meta" and not torch.cuda.is_available())


def peak_resident() -> int:
    """Most bytes that this process has held in memory so far."""
    try:  # the usage that the system reports begins, behind fork and exec, with the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
