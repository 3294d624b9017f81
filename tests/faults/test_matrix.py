"""Kill, stop and break every party of a sync at the points of it: real processes, real Ray, NIXL on the CPU.

Each cell does one thing to one party at one point, and checks what the user sees and by when, what is served
meanwhile, and that the next update brings every engine to one version.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import ray

from rdt_core import WeightSync
from rdt_core.client import actor_name
from rdt_core.errors import RdtError
from rdt_core.ray_session import NAMESPACE
from tests.contract.world import expected_fingerprint
from tests.faults.cells import CELLS, UPDATE_TIMEOUT_S, Cell
from tests.integration.conftest import ROOT, START_TIMEOUT_S
from tests.integration.toy_trainer import start_trainers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.conftest import GatedEngine

DRIVER = """
    import sys
    from rdt_core import WeightSync
    group, *engines = sys.argv[1:]
    WeightSync.connect(group, engines).update(2)
"""


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=START_TIMEOUT_S)


class Stage:
    """Two engines, two trainer ranks under a group name of their own, and this process as the driver."""

    def __init__(self, address: str, start_engine: Callable[[], GatedEngine]) -> None:
        self.address, self._start_engine = address, start_engine
        self.engines = [start_engine(), start_engine()]
        self.group = ""
        self.ranks: list[Any] = []
        self.pids: list[int] = []
        for engine in self.engines:
            engine.wait_until_ready()

    def begin(self, cell: Cell) -> WeightSync:
        """A new group in which both engines serve version 1 and version 2 is there to be read."""
        for number, engine in enumerate(self.engines):
            if not engine.is_alive:
                self.engines[number] = self._start_engine()
                self.engines[number].wait_until_ready()
        self.group = f"faults-{uuid.uuid4().hex[:8]}"
        self.start_trainers()
        self.publish(1)
        sync = WeightSync.connect(self.group, [engine.url for engine in self.engines], mode=cell.mode)
        sync.update(1)
        self.publish(2)
        return sync

    def start_trainers(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = start_trainers(2)
        self.pids = get([rank.attach.remote(self.group) for rank in self.ranks])

    def publish(self, version: int) -> None:
        get([rank.write.remote(version) for rank in self.ranks])
        get([rank.publish.remote(version) for rank in self.ranks])

    def pid_of(self, victim: str) -> int:
        if victim == "trainer":
            return self.pids[1]
        if victim == "engine":
            return self.engines[0].process.pid
        actor = ray.get_actor(actor_name(self.group), namespace=NAMESPACE)
        return int(get(actor.__ray_call__.remote(lambda _: os.getpid())))


@pytest.fixture(scope="module")
def stage(ray_cluster: str, start_engine: Callable[[], GatedEngine]) -> Iterator[Stage]:
    made = Stage(ray_cluster, start_engine)
    yield made
    for rank in made.ranks:
        ray.kill(rank)


class Update(threading.Thread):
    """``sync.update(2)`` in a thread, and what came of it."""

    def __init__(self, sync: WeightSync) -> None:
        super().__init__(daemon=True)
        self._sync = sync
        self.error: RdtError | None = None
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        try:
            self._sync.update(2, timeout_s=UPDATE_TIMEOUT_S)
        except RdtError as error:
            self.error = error
        self.ended = time.monotonic()

    def finish(self) -> str:
        """The type of the reason; empty when the update succeeded."""
        self.join(START_TIMEOUT_S)
        assert not self.is_alive(), "the update hangs"
        reason = self.error.__cause__ if self.error and self.error.__cause__ else self.error
        return type(reason).__name__ if reason else ""


def do_harm(stage: Stage, cell: Cell) -> int:
    """Returns the pid of whom it was done to."""
    if cell.fault == "exception":
        (stage.engines[0].folder / "raise").touch()
        return 0
    pid = stage.pid_of(cell.victim)
    os.kill(pid, getattr(signal, cell.fault))
    return pid


def served(engine: GatedEngine) -> str:
    """What an engine serves, as the cells call it."""
    answer = httpx.get(f"{engine.url}/fingerprint", timeout=START_TIMEOUT_S)
    if not answer.is_success:
        assert answer.json()["error"]["type"] == "EngineTornError"
        return "nothing"
    names = {1: "old", 2: "new"}
    return next(names[version] for version in names if answer.json() == expected_fingerprint(version))


def repair(stage: Stage, cell: Cell, sync: WeightSync, pid: int) -> None:
    """What the cell says, and then version 3 in every engine."""
    (stage.engines[0].folder / "raise").unlink(missing_ok=True)
    if cell.fault == "SIGSTOP":
        os.kill(pid, signal.SIGCONT)
    if cell.victim == "trainer":
        stage.start_trainers()
    if cell.victim == "engine" and cell.fault == "SIGKILL":
        sync.remove_engine(stage.engines[0].url)
        stage.engines[0] = stage._start_engine()
        stage.engines[0].wait_until_ready()
        sync.add_engine(stage.engines[0].url)
    stage.publish(3)
    sync.update(3)
    for engine in stage.engines:
        assert httpx.get(f"{engine.url}/fingerprint", timeout=START_TIMEOUT_S).json() == expected_fingerprint(
            3
        )


@pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if cell.victim != "driver"], ids=lambda cell: str(cell.name)
)
def test_what_the_user_sees_what_serves_and_what_repairs_it(stage: Stage, cell: Cell) -> None:
    sync = stage.begin(cell)
    gated = stage.engines[0]
    if cell.point == "publish" or cell.fault == "exception":
        pid = do_harm(stage, cell)
        update, harmed = Update(sync), time.monotonic()
    else:
        gated.close_gate(cell.point)
        update = Update(sync)
        gated.wait_at(cell.point)
        pid, harmed = do_harm(stage, cell), time.monotonic()
        gated.open_gate(cell.point)
    sees = update.finish()
    print(f"{cell.name}: {sees or 'done'} after {update.ended - harmed:.1f} s")  # noqa: T201  for a person
    assert sees == cell.sees, update.error
    assert update.ended - harmed < cell.within_s
    survivor = stage.engines[1] if cell.victim == "engine" and cell.fault != "exception" else gated
    assert served(survivor) == cell.serves
    repair(stage, cell, sync, pid)
    sync.close()
    if cell.fault == "SIGSTOP" and cell.victim == "engine":
        # See "Known" in docs/reliability.md: it may crash when its old trainers have gone.
        gated.stop()


def test_a_driver_that_is_killed_after_the_read_leaves_the_old_version_and_its_successor_goes_on(
    stage: Stage,
) -> None:
    (cell,) = (cell for cell in CELLS if cell.victim == "driver")
    stage.begin(cell).close()
    stage.engines[0].close_gate(cell.point)
    urls = [engine.url for engine in stage.engines]
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), stage.group, *urls],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": stage.address},
    )
    stage.engines[0].wait_at(cell.point)
    child.kill()
    child.wait(START_TIMEOUT_S)
    stage.engines[0].open_gate(cell.point)
    assert [served(engine) for engine in stage.engines] == [cell.serves] * 2
    with WeightSync.connect(stage.group, urls) as sync:
        assert sync.version == 1
        repair(stage, cell, sync, 0)
