"""Kill, stop and break every party of a sync at every point of it: real processes, real Ray, NIXL on the CPU.

Each cell does one thing to one party at one point, and checks what the user sees, what is served then, and
that the next update brings every engine to one version. All cells share one group, so that a fault which
costs a later sync something is found by it. ``--all`` runs the whole matrix, ``--record`` writes what was
measured into results.json.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.faults.cells import CELLS, LIMIT_S, STOPPED_S, UPDATE_TIMEOUT_S, Cell
from tests.faults.results import Row
from tests.faults.stage import Call, DriverProcess, Stage, break_once, get, resume_later, wait_until_stopped
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.conftest import GatedEngine
    from tests.faults.results import Recorder

BROKEN_METHOD = {
    "connect": "_awaited",
    "publish": "publish",
    "before read": "begin_read",
    "after read": "end_read",
    "after commit": "record",
}
"""What a coordinator is called for at each point."""


@pytest.fixture(scope="module")
def stage(ray_cluster: str, start_engine: Callable[[], GatedEngine]) -> Iterator[Stage]:
    made = Stage(ray_cluster, start_engine)
    yield made
    made.close()


class Scene:
    """One cell being played."""

    def __init__(self, stage: Stage, cell: Cell) -> None:
        self._stage, self._cell = stage, cell
        stage.begin(cell.mode)
        self.old, self.new = stage.version, stage.version + 1
        self._gated = stage.engines[0]
        self._driver: DriverProcess | None = None
        self._pid = 0
        self._resumes_at = 0.0

    def play(self) -> Row:
        """Do the harm, and say what came of it."""
        stage, cell = self._stage, self._cell
        if cell.victim == "driver" or cell.point == "connect":
            stage.leave()
        if cell.victim == "driver":
            self._driver = DriverProcess(stage.group, stage.urls, stage.address)
            if cell.point != "connect":
                self._driver.tell("connect", cell.mode, UPDATE_TIMEOUT_S)
                assert not self._driver.hear()
        if cell.point == "publish":
            stage.write(self.new)
        elif cell.point != "connect":
            stage.publish(self.new)
        call, harmed = self._harm_at_the_point()
        sees = call.finish()
        seconds = max(0.0, call.ended - harmed)
        print(f"{cell.name}: {sees or 'done'} after {seconds:.1f} s: {call.error}")  # noqa: T201  for a person
        return Row(sees=sees, seconds=seconds, serves=self._find_served())

    def _harm_at_the_point(self) -> tuple[Call, float]:
        stage, cell = self._stage, self._cell
        if cell.point == "publish":
            call = self._begin()
            get(stage.ranks[0].publish.remote(self.new))
            harmed = self._harm()
            if cell.victim != "trainer" or cell.fault == "SIGSTOP":
                stage.ranks[1].publish.remote(self.new)
            return call, harmed
        if cell.victim == "trainer" and cell.fault == "exception" and cell.point == "connect":
            harmed = self._harm()
            return self._begin(), harmed
        self._gated.close_gate(cell.point)
        call = self._begin()
        self._gated.wait_at(cell.point)
        if cell.point.endswith("commit"):
            # The other engine is done, so that what each serves in the end does not depend on their order.
            wait_for(lambda: stage.served(stage.engines[1], self.old, self.new) == "new")
        harmed = self._harm()
        self._gated.open_gate(cell.point)
        return call, harmed

    def _begin(self) -> Call:
        """What the user calls."""
        stage, driver = self._stage, self._driver
        if driver is not None:
            words = ("connect", self._cell.mode) if self._cell.point == "connect" else ("update", self.new)
            driver.tell(*words, UPDATE_TIMEOUT_S)
            return Call(lambda: self._hear(driver))
        if self._cell.point == "connect":
            return Call(lambda: stage.connect(self._cell.mode))
        sync = stage.sync
        return Call(lambda: sync.update(self.new, timeout_s=UPDATE_TIMEOUT_S))

    def _hear(self, driver: DriverProcess) -> None:
        answer = driver.hear()
        if answer:
            raise type(answer, (Exception,), {})(self._cell.name)

    def _harm(self) -> float:
        """Returns when it was done."""
        stage, cell = self._stage, self._cell
        if cell.fault == "exception":
            self._break()
            return time.monotonic()
        self._pid = self._find_pid()
        os.kill(self._pid, getattr(signal, cell.fault))
        harmed = time.monotonic()
        if cell.fault == "SIGSTOP":
            wait_until_stopped(self._pid)
            self._resumes_at = harmed + STOPPED_S
            resume_later(self._pid, self._resumes_at)
        elif cell.victim == "driver":
            assert self._driver is not None
            self._driver.process.wait()
        elif cell.victim == "engine":
            stage.engines[0].process.wait()
        return harmed

    def _find_pid(self) -> int:
        stage, victim = self._stage, self._cell.victim
        if victim == "driver":
            assert self._driver is not None
            return self._driver.process.pid
        if victim == "trainer":
            return stage.pids[1]
        return stage.engines[0].process.pid if victim == "engine" else stage.coordinator_pid()

    def _break(self) -> None:
        stage, cell = self._stage, self._cell
        match cell.victim, cell.point:
            case "driver", _:
                assert self._driver is not None
                self._driver.process.send_signal(signal.SIGINT)
            case "engine", _:
                stage.engines[0].raise_at(cell.point)
            case "coordinator", _:
                break_once(stage.coordinator(), BROKEN_METHOD[cell.point])
            case "trainer", "connect":
                get(stage.ranks[1].fail_in_probe.remote())
            case "trainer", "publish":
                get(stage.ranks[1].move_memory.remote())
                with pytest.raises(Exception, match="moved since attach"):
                    get(stage.ranks[1].publish.remote(self.new))
            case _:
                get(stage.ranks[1].fail_in_step.remote())

    def _find_served(self) -> str:
        """By the engines that live. A stopped one says so when it goes on, and has done what it was asked."""
        stage, cell = self._stage, self._cell
        others = stage.served(stage.engines[1], self.old, self.new)
        if cell.victim == "engine" and cell.fault == "SIGKILL":
            return others
        self.wait_until_resumed()
        first = stage.served(stage.engines[0], self.old, self.new)
        return first if first == others else f"{first}; the other: {others}"

    def wait_until_resumed(self) -> None:
        """Until the process that was stopped runs again."""
        left = self._resumes_at - time.monotonic()
        if left > 0:
            time.sleep(left)  # that a process stands still for so long is the fault itself

    def repair(self) -> float:
        """What the cell says, until every engine serves the next version; in how many seconds."""
        stage, cell = self._stage, self._cell
        started = time.monotonic()
        needs_trainers = cell.victim == "trainer" and (
            cell.fault == "SIGKILL" or (cell.fault == "exception" and cell.point in ("connect", "publish"))
        )
        self.wait_until_resumed()
        if needs_trainers:
            stage.start_trainers()
        if cell.victim == "engine" and cell.fault == "SIGKILL":
            stage.replace_engine()
        version = self.new + 1
        stage.publish(version)
        if self._driver is not None and cell.fault != "SIGKILL":
            self._update_by_the_same_driver(self._driver, version)
        else:
            if stage._sync is None:
                stage.connect(cell.mode)
            stage.sync.update(version)
        if self._driver is not None:
            self._driver.end()
        stage.check_all_serve(version)
        return time.monotonic() - started

    def _update_by_the_same_driver(self, driver: DriverProcess, version: int) -> None:
        if self._cell.point == "connect":
            driver.tell("connect", self._cell.mode, UPDATE_TIMEOUT_S)
            assert not driver.hear()
        driver.tell("update", version, UPDATE_TIMEOUT_S)
        assert not driver.hear()


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: str(cell.name))
def test_what_the_user_sees_what_serves_and_what_repairs_it(
    stage: Stage, cell: Cell, recorder: Recorder
) -> None:
    scene = Scene(stage, cell)
    row = scene.play()
    row = replace(row, repair_s=scene.repair())
    recorder.keep(cell.name, row)
    assert cell.allows(row.sees, row.serves), row
    assert row.seconds < LIMIT_S
