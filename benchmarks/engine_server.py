"""An inference engine's server as a process of its own, for a benchmark."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0


def find_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def run_server(
    command: Sequence[str], port: int, *, ready: str, log: Path, env: Mapping[str, str]
) -> Iterator[tuple[str, int]]:
    """A server, once it answers ``ready``; yields its URL and its process. Ended with all that it started.

    Args:
        command: which makes it listen on this port of loopback.
        port: from :func:`find_port`.
        ready: the path that answers as soon as the server can.
        log: gets what it prints.
        env: added to this process's environment.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(url + ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no server at {url}:\n{log.read_text(errors='replace')[-4000:]}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        yield url, process.pid
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_TIMEOUT_S)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2).is_success
    return False
