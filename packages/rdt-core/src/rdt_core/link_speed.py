"""How fast this machine copies: inside one process, between two processes, and on its GPUs. Takes seconds.

Between processes the kernel copies from another process's memory (``process_vm_readv``): what NIXL comes
down to between two CPU processes of one host.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_NBYTES = 1 << 28
_REPEATS = 7
_CHILD_TIMEOUT_S = 30.0
_HOLD = (
    "import ctypes, sys; memory = bytearray(b'\\1') * {nbytes}; "
    "print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True); sys.stdin.read()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """One measured speed.

    Args:
        name: what was copied from where to where.
        bytes_per_s: the best of several runs; None when it could not be measured.
        detail: how, or why not.
    """

    name: str
    bytes_per_s: float | None
    detail: str


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def measure_speeds() -> list[LinkSpeed]:
    """Every speed that this machine has, one after the other. Blocks for a few seconds."""
    found = [_measure_copy(), _measure_other_process()]
    if importlib.util.find_spec("torch") is not None:
        found += _measure_gpus()
    return found


def _best_s(copy: Callable[[], object]) -> float:
    copy()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        copy()
        times.append(time.perf_counter() - started)
    return min(times)


def _measure_copy() -> LinkSpeed:
    source, target = bytearray(b"\1") * _NBYTES, bytearray(_NBYTES)
    view = memoryview(target)

    def copy() -> None:
        view[:] = source

    return LinkSpeed(
        name="copy in one process",
        bytes_per_s=_NBYTES / _best_s(copy),
        detail=f"memcpy of {_NBYTES >> 20} MiB by one thread",
    )


def _measure_other_process() -> LinkSpeed:
    name = "read another process"
    read = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if read is None:
        return LinkSpeed(name=name, bytes_per_s=None, detail="this system has no process_vm_readv")
    read.restype = ctypes.c_ssize_t
    target = bytearray(_NBYTES)
    local = _IoVec(ctypes.addressof(ctypes.c_char.from_buffer(target)), _NBYTES)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD.format(nbytes=_NBYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            address = int(child.stdout.readline()) if child.stdout else 0
            remote = _IoVec(address, _NBYTES)

            def copy() -> None:
                _read_all(read, child.pid, local, remote)

            seconds = _best_s(copy)
        except OSError as error:
            return LinkSpeed(
                name=name,
                bytes_per_s=None,
                detail=f"the kernel refused it ({error.strerror}): NIXL takes slower ways between processes",
            )
        finally:
            child.kill()
            child.wait(_CHILD_TIMEOUT_S)
    return LinkSpeed(
        name=name, bytes_per_s=_NBYTES / seconds, detail=f"process_vm_readv of {_NBYTES >> 20} MiB"
    )


def _read_all(read: Any, pid: int, local: _IoVec, remote: _IoVec) -> None:
    done = read(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if done != remote.length:
        raise OSError(0, f"{done} of {remote.length} bytes were read")


def _measure_gpus() -> list[LinkSpeed]:
    import torch  # noqa: PLC0415  only where it is installed

    if not torch.cuda.is_available():
        return []
    found = [_measure_gpu_pair(0, 0)]
    if torch.cuda.device_count() > 1:
        found.append(_measure_gpu_pair(0, 1))
    return found


def _measure_gpu_pair(source: int, target: int) -> LinkSpeed:
    import torch  # noqa: PLC0415

    held = torch.ones(_NBYTES, dtype=torch.uint8, device=f"cuda:{source}")
    landed = torch.empty(_NBYTES, dtype=torch.uint8, device=f"cuda:{target}")

    def copy() -> None:
        landed.copy_(held)
        torch.cuda.synchronize(target)

    name = f"copy on GPU {source}" if source == target else f"copy from GPU {source} to GPU {target}"
    model = torch.cuda.get_device_name(target)
    return LinkSpeed(name=name, bytes_per_s=_NBYTES / _best_s(copy), detail=f"{_NBYTES >> 20} MiB, {model}")
