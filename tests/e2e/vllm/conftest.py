"""vLLM engines: a server, and a process that looks at one from within."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.processes import (
    API_KEY,
    START_TIMEOUT_S,
    Server,
    end_group,
    find_port,
    open_module,
    serve_command,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

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
def run_probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Run ``tests.e2e.vllm.probe`` with the given arguments and variables; returns what it saw."""
    env = {**os.environ, **ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    forks = open_module("tests.e2e.vllm.probe_forks", env=env)
    assert forks.stdin is not None
    assert forks.stdout is not None
    asked, answered = forks.stdin, forks.stdout

    def run(*args: object, **more: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("probe")
        out, said = folder / "seen.json", folder / "said.txt"
        print(json.dumps([[*map(str, args), "--out", str(out)], more, str(said)]), file=asked, flush=True)
        assert select.select([answered], [], [], START_TIMEOUT_S)[0], said.read_text()[-6000:]
        assert answered.readline() == "0\n", said.read_text()[-6000:]
        return list(json.loads(out.read_text()))

    yield run
    end_group(forks)
    asked.close()
    answered.close()


@contextlib.contextmanager
def serve(model: Path, *args: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server with an API key on a free loopback port, ready to answer; its log is printed when it ends."""
    port = find_port()
    command = [*SERVE, str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"]
    command += [*SMALL, "--api-key", API_KEY, *args]
    whole = {**os.environ, **ENGINE_ENV, **(env or {})}
    with serve_command(command, port, ready="/health", env=whole) as server:
        yield server
