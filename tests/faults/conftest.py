"""Processes of a sync that a test may kill, stop and bring back."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.conftest import ROOT, START_TIMEOUT_S, answers, wait_until
from tests.local_group import wait_for
from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray cluster of this test process; yields its GCS address."""
    with local_ray() as address:
        yield address


class GatedEngine:
    """An engine process with gates (see ``gated_engine``)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "tests.faults.gated_engine", "--gates", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1")
        )

    def wait_until_ready(self) -> None:
        wait_until(lambda: answers(self.url), self.process)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def close_gate(self, point: str) -> None:
        (self.folder / f"{point}.reached").unlink(missing_ok=True)
        (self.folder / f"{point}.armed").touch()

    def wait_at(self, point: str) -> None:
        wait_for((self.folder / f"{point}.reached").exists)

    def open_gate(self, point: str) -> None:
        (self.folder / f"{point}.armed").unlink(missing_ok=True)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(START_TIMEOUT_S)


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], GatedEngine]]:
    """Start a gated engine; it is not awaited, so that several start at once."""
    made: list[GatedEngine] = []
    folder = tmp_path_factory.mktemp("gates")

    def start() -> GatedEngine:
        made.append(GatedEngine(folder / str(len(made))))
        return made[-1]

    yield start
    for engine in made:
        engine.stop()
