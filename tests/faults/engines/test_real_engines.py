"""The matrix's rows of engines and engine ranks with a real vLLM or SGLang of two ranks on the CPU.

``nox -s faults-engines`` runs them in both environments. One server plays many cells; a kill costs a start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core import WeightSync
from rdt_core.engine_http import EngineHttp
from rdt_core.errors import RdtError
from tests.e2e.processes import API_KEY, ROOT, START_TIMEOUT_S, Server, Trainer, start_trainer
from tests.faults.cells import LIMIT_S, STOPPED_S, UPDATE_TIMEOUT_S, Cell
from tests.faults.engines.cells import cells_of
from tests.faults.gates import FOLDER_VARIABLE
from tests.faults.results import Row
from tests.faults.stage import Call
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.faults.results import Recorder

ENGINE = next(name for name in ("vllm", "sglang", "") if not name or importlib.util.find_spec(name))
PROMPT, NUM_TOKENS = [3, 14, 15, 92], 12


def gates_env(gates: Path) -> dict[str, str]:
    """What puts gates into an engine's processes (see ``tests.faults.gates``)."""
    folders = (ROOT / "tests" / "faults" / "engines" / "gates_on_import", ROOT)
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {FOLDER_VARIABLE: str(gates), "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def serve(checkpoint: Path, gates: Path) -> Iterator[Server]:
    """A gated server of two ranks."""
    env = gates_env(gates)
    ours = ("--weight-sync", "rdt")
    if ENGINE == "vllm":
        from tests.e2e.vllm.conftest import serve as serve_vllm

        flags = (*ours, "-tp", "2", "--dtype", "float32", "--enable-scale-out")
        with serve_vllm(checkpoint, *flags, env=env) as server:
            yield server
    else:
        from tests.e2e.sglang.conftest import serve as serve_sglang

        with serve_sglang(checkpoint, *ours, "--tp", "2", "--sleep-on-idle", env=env) as server:
            yield server


def say(server: Server) -> list[int] | None:
    """The greedy answer; None when the engine refuses."""
    if ENGINE == "vllm":
        body: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
        answer = server.post("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
        return answer.json()["choices"][0]["token_ids"] if answer.is_success else None
    sampling = {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = server.post("/generate", {"input_ids": PROMPT, "sampling_params": sampling})
    return answer.json()["output_ids"] if answer.is_success else None


class RealStage:
    """A server, a trainer and a driver that outlive many cells."""

    def __init__(self, checkpoint: Callable[[str, int], Path], ray_address: str, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._stack, self._server_stack = contextlib.ExitStack(), contextlib.ExitStack()
        group = f"faults-{uuid.uuid4().hex[:8]}"
        self.trainer: Trainer = self._stack.enter_context(
            start_trainer(group, ray_address, checkpoint("qwen3", 0))
        )
        self.server: Server | None = None
        self.sync: WeightSync | None = None
        self.version = 0
        self.said: dict[int, list[int]] = {}

    def begin(self, mode: str = "staged") -> None:
        """The engine serves ``self.version``, and reads in this mode."""
        if self.server is None:
            self.server = self._server_stack.enter_context(serve(self._checkpoint("qwen3", 0), self._folder))
        if self.sync is None:
            self.connect(timeout_s=START_TIMEOUT_S)
        self.advance(mode)

    def connect(self, *, timeout_s: float = UPDATE_TIMEOUT_S) -> None:
        assert self.server is not None
        self.sync = WeightSync.connect(
            self.trainer.group, [self.server.url], api_key=API_KEY, timeout_s=timeout_s
        )

    def publish(self) -> int:
        version = self.version + 1
        self.trainer.publish(self._checkpoint("qwen3", version % 3), version)
        return version

    def advance(self, mode: str) -> None:
        """One update without a fault, and what the engine says then."""
        assert self.sync is not None
        assert self.server is not None
        version = self.publish()
        self.sync.update(version, mode=mode)
        self.version = version
        answer = say(self.server)
        assert answer is not None
        assert answer == self.said.setdefault(version % 3, answer)

    def served(self, old: int, new: int) -> str:
        assert self.server is not None
        if not self.is_alive:
            return "nothing: it is gone"
        answer = say(self.server)
        if answer is None:
            return "nothing"
        return {tuple(self.said.get(old % 3, [])): "old", tuple(self.said.get(new % 3, [])): "new"}.get(
            tuple(answer), f"a mix: {answer}"
        )

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests; a process that still tidies up after a loss does not."""
        assert self.server is not None
        return self.server.process.poll() is None and EngineHttp(self.server.url).is_listening()

    def lose_server(self) -> None:
        """What a fault has killed is gone, with all that is left of it."""
        if self.sync is not None:
            self.sync.close()
        self._server_stack.close()
        self.server = self.sync = None

    def close(self) -> None:
        self.lose_server()
        self._stack.close()


@pytest.fixture(scope="module")
def stage(
    checkpoint: Callable[[str, int], Path], ray_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealStage]:
    made = RealStage(checkpoint, ray_address, tmp_path_factory.mktemp("gates"))
    made.begin()
    # So that what each seed says is known before anything is broken.
    made.advance("staged")
    made.advance("staged")
    assert len({tuple(said) for said in made.said.values()}) == 3
    yield made
    made.close()


class Scene:
    """One cell being played."""

    def __init__(self, stage: RealStage, cell: Cell, folder: Path) -> None:
        self._stage, self._cell, self._folder = stage, cell, folder
        stage.begin(cell.mode)
        self.old, self.new = stage.version, stage.version + 1

    def play(self) -> Row:
        stage, cell = self._stage, self._cell
        assert stage.sync is not None
        sync = stage.sync
        if cell.point == "connect":
            sync.close()
            act: Callable[[], object] = stage.connect
        else:
            stage.publish()

            def act() -> object:
                return sync.update(self.new, timeout_s=UPDATE_TIMEOUT_S)

        if cell.fault == "exception":
            (self._folder / f"{cell.point}.raise").touch()
            harmed, call = time.monotonic(), Call(act)
        elif cell.point == "publish":
            pid = stage.server.process.pid if stage.server else 0
            self._harm(pid)
            harmed, call = time.monotonic(), Call(act)
        else:
            armed, reached = self._folder / f"{cell.point}.armed", self._folder / f"{cell.point}.reached"
            reached.unlink(missing_ok=True)
            armed.touch()
            call = Call(act)
            wait_for(reached.exists)
            self._harm(int(reached.read_text()))
            harmed = time.monotonic()
            armed.unlink()
        sees = call.finish()
        seconds = max(0.0, call.ended - harmed)
        print(f"{cell.name}: {sees or 'done'} after {seconds:.1f} s: {call.error}")  # noqa: T201  for a person
        if cell.fault == "SIGSTOP":
            time.sleep(max(0.0, harmed + STOPPED_S - time.monotonic()))  # the fault itself
            self._signal(signal.SIGCONT)
        if cell.fault == "SIGKILL":
            # Of an engine that lost a rank the rest ends by itself.
            wait_for(lambda: not stage.is_alive)
        return Row(sees=sees, seconds=seconds, serves=stage.served(self.old, self.new))

    def _harm(self, rank_pid: int) -> None:
        self._rank_pid = rank_pid
        self._signal(getattr(signal, self._cell.fault))

    def _signal(self, number: int) -> None:
        server = self._stage.server
        assert server is not None
        if self._cell.victim.endswith("rank"):
            os.kill(self._rank_pid, number)
        else:
            os.killpg(server.process.pid, number)

    def repair(self) -> float:
        stage = self._stage
        started = time.monotonic()
        stage.version = self.new
        if self._cell.fault == "SIGKILL":
            stage.lose_server()
        elif self._cell.point == "connect":
            stage.sync = None
        stage.begin(self._cell.mode)
        return time.monotonic() - started


@pytest.mark.skipif(not ENGINE, reason="neither vllm nor sglang is installed here")
@pytest.mark.parametrize("cell", cells_of(ENGINE), ids=lambda cell: str(cell.name))
def test_what_the_user_sees_what_serves_and_what_repairs_it(
    stage: RealStage, cell: Cell, recorder: Recorder
) -> None:
    scene = Scene(stage, cell, stage._folder)
    try:
        row = replace(scene.play(), repair_s=scene.repair())
    except (AssertionError, RdtError):
        stage.lose_server()
        raise
    recorder.keep(cell.name, row)
    assert cell.allows(row.sees, row.serves), row
    assert row.seconds < LIMIT_S
