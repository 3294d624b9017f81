"""SGLang servers on the CPU, in the environment that nox session env-sglang builds."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # has no types

from tests.e2e.processes import API_KEY, ROOT, Server, Trainer, find_port, serve_command, start_trainer
from tests.e2e.sglang.asking import ask_all, auth_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

# Greedy answers of servers that have loaded the checkpoint of a family and seed from disk.
LOADED: dict[tuple[str, int], list[list[int]]] = {}

# Family, seed of the checkpoint that the server is started from, flags. A scheduler polls its sockets with a
# whole core, so that two of them would leave nothing of a small machine: those sleep when they are idle.
CASES = {
    "ray": ("qwen3", 0, ["--use-ray", "--disable-overlap-schedule", "--sleep-on-idle"]),
    "dp2": ("qwen3", 1, ["--dp", "2", "--sleep-on-idle"]),
    "tp2-moe": ("qwen3_moe", 0, ["--tp", "2", "--sleep-on-idle"]),
}

# The case among the parameters in a test's name.
CASE_IN_ID = re.compile(rf"[\[-]({'|'.join(CASES)})[\]-]")

# Loopback only, one thread a process, no network lookups, no compiler.
ENGINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1|0|1",
    "TORCHDYNAMO_DISABLE": "1",
}

# An engine learns from the driver how its Ray cluster authenticates, so it must do without the variable.
NOT_INHERITED = frozenset({"RAY_AUTH_MODE", "RAY_ADDRESS"})

# In float32, where greedy answers do not depend on how tensor parallelism orders its sums.
SMALL = [
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--cuda-graph-backend-decode", "disabled"),
    *("--cuda-graph-backend-prefill", "disabled", "--disable-custom-all-reduce", "--skip-server-warmup"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "8192", "--dtype", "float32"),
    *("--random-seed", "1"),
]


def engine_env() -> dict[str, str]:
    """The environment of a server process."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return {**inherited, **ENGINE_ENV}


def server_command(model: Path, port: int, args: Sequence[str]) -> list[str]:
    """The command line that a user would type, with what makes it small."""
    where = ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "sglang.launch_server", *where, *SMALL, *args]


@contextlib.contextmanager
def serve(model: Path, *args: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server with an admin key on a free loopback port; its log is printed when it ends."""
    port = find_port()
    command = server_command(model, port, ["--admin-api-key", API_KEY, *args])
    # /health generates a token; this answers as soon as the server can.
    with serve_command(command, port, ready="/model_info", env={**engine_env(), **(env or {})}) as server:
        yield server


def breakable(fault: Path) -> dict[str, str]:
    """The environment of a server whose processes look into that file; see ``faults/sitecustomize.py``."""
    faults = ROOT / "tests" / "e2e" / "sglang" / "faults"
    path = os.pathsep.join(filter(None, (str(faults), os.environ.get("PYTHONPATH"))))
    return {"RDT_TEST_FAULT": str(fault), "PYTHONPATH": path}


class OneServerEach(LoadScopeScheduling):  # type: ignore[misc]  # see its import
    """All tests of a case run in one process, whatever file they are in, so that they share its server.

    pytest-xdist 3.8 has ``--dist loadgroup`` for this, which has no effect under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        case = CASE_IN_ID.search(nodeid)
        return case[1] if case else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneServerEach:
    """Give tests to processes by their server, then by their file. Called where ``-n`` is given."""
    return OneServerEach(config, log)


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def family(case: str) -> str:
    return CASES[case][0]


@pytest.fixture(scope="session")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written here breaks a rank of every server; see ``faults/sitecustomize.py``."""
    path = tmp_path_factory.mktemp("fault") / "fault"
    path.write_text("")
    return path


@pytest.fixture(scope="session")
def server(
    case: str, family: str, fault: Path, ray_address: str, checkpoint: Callable[[str, int], Path]
) -> Iterator[Server]:
    """One server a case for all tests. Ray is there before it, while the machine is still idle."""
    _, seed, flags = CASES[case]
    # Where SGLang itself joins Ray, it has to know how.
    ray_env = {"RAY_ADDRESS": ray_address, "RAY_AUTH_MODE": auth_mode()} if case == "ray" else {}
    env = breakable(fault) | ray_env
    with serve(checkpoint(family, seed), "--weight-sync", "rdt", *flags, env=env) as started:
        LOADED[family, seed] = ask_all(started)
        yield started


@pytest.fixture(scope="session")
def trainer(ray_address: str, family: str, checkpoint: Callable[[str, int], Path]) -> Iterator[Trainer]:
    """One trainer for all tests of a case, which none of them may end."""
    with start_trainer(f"group-{uuid.uuid4().hex[:8]}", ray_address, checkpoint(family, 0)) as started:
        yield started


@pytest.fixture
def mortal(ray_address: str, family: str, checkpoint: Callable[[str, int], Path]) -> Iterator[Trainer]:
    """A trainer of a group of its own, for a test that ends it."""
    with start_trainer(f"group-{uuid.uuid4().hex[:8]}", ray_address, checkpoint(family, 0)) as started:
        yield started
