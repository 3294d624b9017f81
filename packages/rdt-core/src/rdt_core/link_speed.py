"""How fast this machine copies: inside one process, between two processes, and on its GPUs. Takes seconds.

Each copy is made as a sync makes it. Inside a process torch copies, with its threads, where it is installed.
Between processes the kernel copies from another process's memory (``process_vm_readv``), which is what NIXL
comes down to on one host, and that memory is on huge pages, where our NIXL transport puts what it offers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

_NBYTES = 1 << 28
_REPEATS = 7
_CHILD_TIMEOUT_S = 30.0
# Written after the advice, so that the kernel takes huge pages from the start.
_HOLD = (
    "import ctypes, mmap, sys\n"
    "memory = mmap.mmap(-1, {nbytes}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
    "memory.madvise(mmap.MADV_HUGEPAGE)\n"
    "memory[:] = b'\\1' * {nbytes}\n"
    "print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)\n"
    "sys.stdin.read()\n"
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


class LocalCopy:
    """A copy inside this process, as a commit makes it on a CPU. Holds its two buffers."""

    def __init__(self) -> None:
        source, target = _hold(1), _hold(0)
        if importlib.util.find_spec("torch") is None:
            self._copy: Callable[[], object] = _by_memcpy(source, target)
            self.detail = f"memcpy of {_NBYTES >> 20} MiB by one thread"
        else:
            import torch  # noqa: PLC0415  only where it is installed

            landed = torch.frombuffer(target, dtype=torch.uint8)
            held = torch.frombuffer(source, dtype=torch.uint8)
            self._copy = lambda: landed.copy_(held)
            self.detail = f"torch, {_NBYTES >> 20} MiB by up to {torch.get_num_threads()} threads"

    def measure(self) -> float:
        """Bytes per second of one copy, each byte counted once."""
        return _NBYTES / _timed(self._copy)


class RemoteMemory:
    """Memory of a child process, to be read from here. A context manager, which ends the child."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        if not hasattr(library, "process_vm_readv"):
            raise OSError(0, "this system has no process_vm_readv")
        self._read = library.process_vm_readv
        self._read.restype = ctypes.c_ssize_t
        self._target = _hold(0)
        self._local = _IoVec(ctypes.addressof(ctypes.c_char.from_buffer(self._target)), _NBYTES)
        self._child = subprocess.Popen(
            [sys.executable, "-c", _HOLD.format(nbytes=_NBYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self._child.stdout.readline() if self._child.stdout else ""
        if not line:
            self.__exit__()
            raise OSError(0, "the process that was to hold memory did not start")
        self._remote = _IoVec(int(line), _NBYTES)

    def measure(self) -> float:
        """Bytes per second of one read.

        Raises:
            OSError: the kernel refuses to read another process.
        """
        return _NBYTES / _timed(self._read_all)

    def _read_all(self) -> None:
        done = self._read(self._child.pid, ctypes.byref(self._local), 1, ctypes.byref(self._remote), 1, 0)
        if done < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        if done != _NBYTES:
            raise OSError(0, f"{done} of {_NBYTES} bytes were read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate(timeout=_CHILD_TIMEOUT_S)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def measure_speeds() -> list[LinkSpeed]:
    """Every speed that this machine has, one after the other. Blocks for a few seconds."""
    copy = LocalCopy()
    found = [
        LinkSpeed(name="copy in one process", bytes_per_s=_best(copy.measure), detail=copy.detail),
        _measure_other_process(),
    ]
    if importlib.util.find_spec("torch") is not None:
        found += _measure_gpus()
    return found


def _hold(value: int) -> mmap.mmap:
    """Memory of its own that begins on a page, as tensors begin on a cache line, with its pages there.

    A bytearray begins 16 bytes past one. Zen 3 takes four times as long for copies to 16 bytes past their
    source, modulo 4 KiB.
    """
    memory = mmap.mmap(-1, _NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes([value]) * _NBYTES
    return memory


def _timed(copy: Callable[[], object]) -> float:
    started = time.perf_counter()
    copy()
    return time.perf_counter() - started


def _best(measure: Callable[[], float]) -> float:
    measure()
    return max(measure() for _ in range(_REPEATS))


def _by_memcpy(source: mmap.mmap, target: mmap.mmap) -> Callable[[], None]:
    view = memoryview(target)

    def copy() -> None:
        view[:] = source

    return copy


def _measure_other_process() -> LinkSpeed:
    name = "read another process"
    try:
        with RemoteMemory() as memory:
            speed = _best(memory.measure)
    except OSError as error:
        refused = f"refused ({error.strerror}): NIXL takes slower ways between processes"
        return LinkSpeed(name=name, bytes_per_s=None, detail=refused)
    return LinkSpeed(
        name=name, bytes_per_s=speed, detail=f"process_vm_readv of {_NBYTES >> 20} MiB on huge pages"
    )


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
    speed = _best(lambda: _NBYTES / _timed(copy))
    return LinkSpeed(name=name, bytes_per_s=speed, detail=f"{_NBYTES >> 20} MiB, {model}")
