"""The machine and this process: where a number comes from, and the most memory that was held. No torch at import."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor (or GPU), threads and versions, as results keep them."""
    from importlib.metadata import version

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


def readable_bytes(count: float) -> str:
    """A number of bytes in the largest unit that it is at least one of, as in 1.5 GiB, 20.0 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} bytes"


def peak_resident() -> int:
    """Most bytes that this process has held in memory so far."""
    try:  # the usage that the system reports begins, behind fork and exec, with the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)


def forget_peak_resident() -> None:
    """Let `peak_resident` count from now on, where the system can (Linux); what was freed is given back before."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc, which keeps freed memory for later
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """Limits on the memory of this process's groups (a container's, a batch job's), and what is in use of each.

    Pages of files that the kernel can drop at once do not count as used. Linux control groups, both versions
    (https://docs.kernel.org/admin-guide/cgroup-v2.html); elsewhere none.

    Args:
        root: where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names, droppable = root / "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            droppable = "total_inactive_file"
        else:
            continue
        group = base / path.strip("/")
        for folder in (group, *group.parents):  # a limit above holds as well
            if folder.is_relative_to(base):
                found += _limit_of(folder, *names, droppable)
    return found


def _limit_of(folder: Path, limit: str, usage: str, droppable: str) -> list[tuple[int, int]]:
    """Of one group; none: it has no limit, or this process cannot see it."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        files = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [] if most == "max" else [(int(most), max(0, used - int(files.get(droppable, 0))))]
    except (OSError, ValueError):
        return []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
