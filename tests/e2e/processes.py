"""Engine servers and trainers as processes of their own, each ended by its id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 30.0
NICENESS = "5"
API_KEY = "only-for-tests"
ANSWER = "trainer: "


@dataclass(frozen=True, slots=True)
class Server:
    """One engine server of ours."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, *, key: str | None = API_KEY) -> httpx.Response:
        return httpx.get(self.url + path, headers=_bearer(key), timeout=60)

    def post(self, path: str, body: object = None, *, key: str | None = API_KEY) -> httpx.Response:
        return httpx.post(self.url + path, json=body or {}, headers=_bearer(key), timeout=120)


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def find_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve_command(
    command: Sequence[str], port: int, *, ready: str, env: Mapping[str, str]
) -> Iterator[Server]:
    """A server, once it answers ``ready``; its log is printed when it ends.

    It leads a process group, not a session: where Linux groups tasks by session (sched_autogroup_enabled),
    polling schedulers in a session of their own kept Ray and the trainers off two cores for seconds. And it
    is a little nicer than those: SGLang's data-parallel controller polls with a whole core.

    Args:
        command: which makes it listen on the port.
        port: of loopback.
        ready: the path that answers as soon as the server can.
        env: the whole environment.
    """
    with tempfile.NamedTemporaryFile(prefix="engine-", suffix=".log") as log:
        process = subprocess.Popen(
            ["nice", "-n", NICENESS, *command],  # becomes the command
            cwd=ROOT,
            env=env,
            stdout=log,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        server = Server(f"http://127.0.0.1:{port}", process, Path(log.name))
        try:
            wait_until(lambda: _is_ready(server, ready), process, server.log)
            yield server
        finally:
            end_group(process)
            tail = server.log.read_text(errors="replace")[-20000:]
            print(tail)  # noqa: T201  pytest shows it with a failure


def _is_ready(server: Server, path: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return server.get(path).is_success
    return False


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[Any], log: Path) -> None:
    """Wait for a condition while a process lives."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_true():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-6000:]
            pytest.fail(f"not ready (exit status {process.returncode}): {process.args!r}\n{tail}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a process group, and whatever is left of that group."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_TIMEOUT_S)


def open_module(module: str, *args: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """A Python process that is talked to by lines, and leads a process group; end it by :func:`end_group`."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        cwd=ROOT,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )


class Trainer:
    """A trainer process that holds a checkpoint, writes others over it and publishes."""

    def __init__(self, group: str, process: subprocess.Popen[str]) -> None:
        self.group, self.process = group, process
        self.version = 0

    def ask(self, *words: object) -> str:
        """Send one line and wait for its answer, or for the process to end; libraries print between."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        answers = (line for line in self.process.stdout if line.startswith(ANSWER))
        return next(answers, "").removeprefix(ANSWER).strip()

    def publish(self, folder: Path, version: int) -> None:
        assert self.ask("publish", folder, version) == f"published {version}"
        self.version = version


@contextlib.contextmanager
def start_trainer(group: str, ray_address: str, folder: Path) -> Iterator[Trainer]:
    """A plain process that joins Ray as a driver and attaches; ended by its id."""
    env = {**os.environ, "RAY_ADDRESS": ray_address, "OMP_NUM_THREADS": "1"}
    process = open_module("tests.e2e.trainer", group, str(folder), env=env)
    trainer = Trainer(group, process)
    try:
        assert trainer.ask("hello") == "attached"
        yield trainer
    finally:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.communicate(timeout=STOP_TIMEOUT_S)  # the end of its stdin ends it
        end_group(process)
