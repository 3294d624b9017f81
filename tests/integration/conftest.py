"""Fixtures for tests that bring up real trainer actors and a real engine process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

START_TIMEOUT_S = 120.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--cycles``: how often the test of leaks connects and disconnects."""
    parser.addoption("--cycles", type=int, default=25)


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray cluster of this test process; yields its GCS address."""
    with local_ray() as address:
        yield address


@pytest.fixture
def group() -> str:
    """A group name that no other test uses."""
    return f"group-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def start_toy_engine() -> Iterator[Callable[..., str]]:
    """Start a toy engine process with the given arguments; returns its URL when it serves."""
    with contextlib.ExitStack() as stack:

        def start(*args: str) -> str:
            return stack.enter_context(toy_engine(*args))

        yield start


@contextlib.contextmanager
def toy_engine(*args: str) -> Iterator[str]:
    """A toy engine process on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.integration.toy_engine", "--port", str(port), *args]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"))
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url), process)
        yield url
    finally:
        process.kill()
        process.wait(START_TIMEOUT_S)


def answers(url: str) -> bool:
    """Whether an engine serves at a URL."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/fingerprint", timeout=5).is_success
    return False


def wait_until(is_true: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    """Wait for a condition while a process lives."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_true():
        if process.poll() is not None:
            pytest.fail(f"{process.args!r} ended with {process.returncode}")
        if time.monotonic() > deadline:
            pytest.fail(f"{process.args!r} was not ready after {START_TIMEOUT_S} s")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
