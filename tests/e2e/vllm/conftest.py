"""Tiny checkpoints, engine processes and a trainer process, each ended by its own id."""

from __future__ import annotations

import contextlib
import json
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

from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[3]
START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 30.0
API_KEY = "only-for-tests"
ANSWER = "trainer: "

# Loopback only, one thread a process, no network lookups. The engine in a probe runs in the probe's process.
ENGINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
SMALL = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A tiny checkpoint by family and seed, made on first use."""
    from tests.e2e.vllm.tiny_models import save_checkpoint

    made: dict[tuple[str, int], Path] = {}

    def find(family: str, seed: int) -> Path:
        if (family, seed) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{seed}")
            made[family, seed] = save_checkpoint(family, seed, folder)
        return made[family, seed]

    return find


@pytest.fixture(scope="session")
def run_probe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Run ``tests.e2e.vllm.probe`` with the given arguments; returns what it saw."""

    def run(*args: object) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp("probe") / "seen.json"
        command = [sys.executable, "-m", "tests.e2e.vllm.probe", *map(str, args), "--out", str(out)]
        env = {**os.environ, **ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return list(json.loads(out.read_text()))

    return run


@dataclass(frozen=True, slots=True)
class Server:
    """One ``vllm serve`` process of ours."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, *, key: str | None = API_KEY) -> httpx.Response:
        return httpx.get(self.url + path, headers=_bearer(key), timeout=60)

    def post(self, path: str, body: object = None, *, key: str | None = API_KEY) -> httpx.Response:
        return httpx.post(self.url + path, json=body or {}, headers=_bearer(key), timeout=120)


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextlib.contextmanager
def serve(model: Path, *args: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server with an API key on a free loopback port, ready to answer; its log is printed when it ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*SERVE, str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"]
    command += [*SMALL, "--api-key", API_KEY, *args]
    with tempfile.NamedTemporaryFile(prefix="vllm-serve-", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **ENGINE_ENV, **(env or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(f"http://127.0.0.1:{port}", process, Path(log.name))
        try:
            wait_until(lambda: _is_healthy(server), process, server.log)
            yield server
        finally:
            _end(process)
            tail = server.log.read_text(errors="replace")[-20000:]
            print(tail)  # noqa: T201  pytest shows it with a failure


def _is_healthy(server: Server) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return server.get("/health").is_success
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


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session of its own, and whatever is left of that session."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_TIMEOUT_S)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A local Ray cluster of this test process; yields its GCS address."""
    with local_ray() as address:
        yield address


class Trainer:
    """A trainer process that holds a checkpoint, writes others over it and publishes."""

    def __init__(self, group: str, process: subprocess.Popen[str]) -> None:
        self.group, self.process = group, process

    def ask(self, *words: object) -> str:
        """Send one line and wait for its answer, or for the process to end; libraries print between."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        answers = (line for line in self.process.stdout if line.startswith(ANSWER))
        return next(answers, "").removeprefix(ANSWER).strip()

    def publish(self, folder: Path, version: int) -> None:
        assert self.ask("publish", folder, version) == f"published {version}"


@contextlib.contextmanager
def start_trainer(group: str, ray_address: str, folder: Path) -> Iterator[Trainer]:
    """A plain process that joins Ray as a driver and attaches; ended by its id."""
    command = [sys.executable, "-m", "tests.e2e.vllm.trainer", group, str(folder)]
    env = {**os.environ, "RAY_ADDRESS": ray_address, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    trainer = Trainer(group, process)
    try:
        assert trainer.ask("hello") == "attached"
        yield trainer
    finally:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.communicate(timeout=STOP_TIMEOUT_S)  # the end of its stdin ends it
        _end(process)
