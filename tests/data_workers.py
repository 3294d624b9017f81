"""openYuanrong data workers for tests: loopback, free ports, a temp dir, ended by whoever started them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class DataWorker:
    """A running worker."""

    port: int
    pid: int

    @property
    def env(self) -> dict[str, str]:
        """What its clients read."""
        return {"DATASYSTEM_HOST": "127.0.0.1", "DATASYSTEM_PORT": str(self.port)}


def find_obstacle() -> str | None:
    """Why no worker can be started here, or None."""
    if importlib.util.find_spec("yr") is None:
        return "openyuanrong-datasystem is not installed (rdt-core[yr])"
    return None


@contextlib.contextmanager
def data_workers(num_workers: int, *, memory_mb: int = 64) -> Iterator[list[DataWorker]]:
    """Workers that share one metadata service, as the nodes of a cluster do; etcd is not needed."""
    with tempfile.TemporaryDirectory(prefix="rdt-yr", dir="/tmp") as home, contextlib.ExitStack() as stack:
        metastore, *ports = find_free_ports(num_workers + 1)
        workers = []
        for index, port in enumerate(ports):
            workers.append(
                start_worker(Path(home) / str(index), port, metastore, memory_mb, is_head=index == 0)
            )
            stack.callback(stop_worker, workers[-1])
        yield workers


def start_worker(home: Path, port: int, metastore: int, memory_mb: int, *, is_head: bool) -> DataWorker:
    """Start one worker and return when it is ready."""
    options = {
        "worker_address": f"127.0.0.1:{port}",
        "metastore_address": f"127.0.0.1:{metastore}",
        "start_metastore_service": str(is_head).lower(),
        "shared_memory_size_mb": str(memory_mb),
        "arena_per_tenant": "1",
        "enable_worker_worker_batch_get": "true",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [str(Path(sys.executable).parent / "dscli"), "start", "-t", str(START_TIMEOUT_S)]
    done = subprocess.run(
        [*command, "-d", str(home), "-w", *arguments],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S + 30,
        check=False,
    )
    started = re.search(r"\[  OK  \].*PID: (\d+)", done.stdout + done.stderr)
    if started is None:
        raise RuntimeError(f"dscli start failed: {done.stdout}{done.stderr}")
    return DataWorker(port, int(started[1]))


def stop_worker(worker: DataWorker) -> None:
    """End a worker at once: it holds nothing that outlives a test, and an orderly end takes seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while is_running(worker.pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"data worker {worker.pid} was killed and did not end")
        threading.Event().wait(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and not only waits to be reaped."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def find_free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
