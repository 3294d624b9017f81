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

from tests.faults.gates import FOLDER_VARIABLE
from tests.faults.results import Recorder
from tests.integration.conftest import ROOT, START_TIMEOUT_S, answers, wait_until
from tests.local_group import wait_for
from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all``: every cell, not only the quick ones; ``--record``: write results.json."""
    parser.addoption("--all", action="store_true")
    parser.addoption("--record", action="store_true")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--all``, deselect the cells that are not quick."""
    if config.getoption("--all"):
        return
    slow = [item for item in items if not _is_quick(item)]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if _is_quick(item)]


def _is_quick(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    cell = call.params.get("cell") if call is not None else None
    return cell is None or cell.is_quick


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recorder:
    """Keeps what this run measures."""
    return Recorder(bool(pytestconfig.getoption("--record")))


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
        command = [sys.executable, "-m", "tests.faults.gated_engine", "--port", str(port)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", FOLDER_VARIABLE: str(folder)}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env)

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

    def raise_at(self, point: str) -> None:
        """The next time it comes to this point."""
        (self.folder / f"{point}.raise").touch()

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
