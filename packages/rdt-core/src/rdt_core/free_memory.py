"""How much memory is free on an engine rank's device, as far as it can be measured."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def measure_free_bytes(device: torch.device) -> int | None:
    """Bytes that this process could still allocate on ``device``; None where nothing tells.

    On CUDA: what the driver has free and what torch's allocator holds unused. On the CPU: the kernel's
    estimate of available memory, or what the container's limit leaves, whichever is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        found = [nbytes for nbytes in (_available_bytes(), _cgroup_bytes()) if nbytes is not None]
        return min(found, default=None)
    return None


def measure_host_share(device: torch.device, world_size: int) -> int | None:
    """Bytes of host memory that one of ``world_size`` ranks could take; None if ``device`` is the host.

    As if all ranks of the engine lived on this host, which errs to the safe side.
    """
    free = None if device.type == "cpu" else measure_free_bytes(torch.device("cpu"))
    return None if free is None else free // world_size


def _available_bytes() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _cgroup_bytes() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_CGROUP / "memory.current").read_text(encoding="ascii").strip()
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if limit == "max":
        return None
    # The page cache counts as used and is given back on demand.
    cached = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    return max(0, int(limit) - int(used) + cached)
