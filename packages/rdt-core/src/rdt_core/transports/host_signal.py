"""Waiting for a CUDA stream outside of Python, with a deadline.

``Event.synchronize`` has no deadline, and asking again and again takes the GIL each time, which beside a
polling scheduler costs a millisecond a turn. Here the driver's own thread posts a semaphore when the stream
gets there, and the waiting thread sleeps on it in one C call.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import time

_SEM_T_BYTES = 32  # glibc, 64-bit


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class HostSignal:
    """A semaphore. Its address and that of ``sem_post`` are given to ``cuLaunchHostFunc``.

    Raises:
        OSError: the C library is older than glibc 2.30.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            self._wait = libc.sem_clockwait
        except AttributeError as error:
            raise OSError(errno.ENOSYS, "the C library has no sem_clockwait (glibc 2.30)") from error
        self._semaphore = ctypes.create_string_buffer(_SEM_T_BYTES)
        if libc.sem_init(self._semaphore, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.post_address = ctypes.cast(libc.sem_post, ctypes.c_void_p)
        self.argument = ctypes.cast(self._semaphore, ctypes.c_void_p)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until posted, without the GIL. Returns False when ``timeout_s`` seconds passed first."""
        fraction, seconds = math.modf(time.clock_gettime(time.CLOCK_MONOTONIC) + max(timeout_s, 0.0))
        until = ctypes.byref(_Timespec(int(seconds), int(fraction * 1e9)))
        while self._wait(self._semaphore, ctypes.c_int(time.CLOCK_MONOTONIC), until) != 0:
            code = ctypes.get_errno()
            if code == errno.ETIMEDOUT:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return True
