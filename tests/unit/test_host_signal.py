from __future__ import annotations

import ctypes
import threading
import time

from rdt_core.transports.host_signal import HostSignal


def post(signal: HostSignal) -> None:
    """What the CUDA driver's thread does."""
    assert signal.post_address.value is not None
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(signal.post_address.value)(signal.argument)


def test_a_posted_signal_ends_the_wait_once() -> None:
    signal = HostSignal()
    post(signal)
    assert signal.wait(30.0)
    assert not signal.wait(0.0)


def test_a_signal_posted_later_wakes_the_waiting_thread() -> None:
    signal = HostSignal()
    woken = threading.Event()

    def wait() -> None:
        if signal.wait(30.0):
            woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not woken.is_set()
    post(signal)
    assert woken.wait(30.0)
    thread.join(30.0)


def test_a_wait_ends_at_its_deadline() -> None:
    started = time.monotonic()
    assert not HostSignal().wait(0.05)
    assert time.monotonic() - started >= 0.05
