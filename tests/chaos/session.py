"""A chaos run: engines under load, a sync every second, and faults that nobody is told about."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import ray

from rdt_core import WeightSync
from rdt_core.client import actor_name
from rdt_core.errors import RdtError
from rdt_core.ray_session import NAMESPACE
from tests.chaos.engines import KINDS, EngineProcess
from tests.chaos.holdings import look_at
from tests.chaos.load import Load
from tests.chaos.trainers import Trainers
from tests.faults.driver_process import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tests.chaos.holdings import Holdings
    from tests.chaos.plan import Fault

GROUP = "chaos"
PERIOD_S = 1.0
UPDATE_TIMEOUT_S = 8.0
CONNECT_TIMEOUT_S = 20.0
HANG_S = 200.0
"""A driver that has been in one call for longer hangs: an update that waits to the end of every deadline,
connects its engines again and reads once more is shorter."""

RECOVER_S = 240.0
"""After the last fault, for an engine that was lost to start again on a machine that does much else."""


class Session:
    """Everything that runs. Make it, :meth:`start`, :meth:`run`, :meth:`close`.

    Args:
        places: kinds of engines, one a place; an engine that died is replaced by one of its kind.
        pythons: the interpreter of each kind.
        checkpoint: that engines load when they start.
        say: is given a line when something happens.
    """

    def __init__(
        self,
        places: Sequence[str],
        pythons: Mapping[str, str],
        checkpoint: Path,
        say: Callable[[str], None],
    ) -> None:
        self._places, self._pythons, self._checkpoint, self._say = places, pythons, checkpoint, say
        self._trainers = Trainers(GROUP)
        self._engines = [self._new_engine(kind) for kind in places]
        self._coming: dict[int, EngineProcess] = {}
        self.loads = [Load(f"{number} {kind}") for number, kind in enumerate(places)]
        self._sync: WeightSync | None = None
        self._mode = "staged"
        self._wants_new_driver = False
        self._last_failure = "none"
        self._call_began: float | None = None
        self.in_call = "no call"
        self.version = 0
        self.updates: Counter[str] = Counter()
        self.reports: list[float] = []
        self.faults: Counter[str] = Counter()
        self.longest_call_s = 0.0
        self.hangs: list[str] = []

    def _new_engine(self, kind: str) -> EngineProcess:
        return EngineProcess(KINDS[kind], self._pythons[kind], self._checkpoint)

    def start(self) -> None:
        """Until every engine serves version 1 and is under load."""
        self._trainers.start()
        for engine in self._engines:
            engine.wait_until_ready()
        deadline = time.monotonic() + RECOVER_S
        while not self.reports:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no update succeeds before the first fault; the last: {self._last_failure}"
                )
            self._sync_once()
        for load, engine in zip(self.loads, self._engines, strict=True):
            load.aim(engine)

    def hold(self) -> dict[str, Holdings]:
        """What this process and the engines of this moment hold, by name."""
        named = {"driver": os.getpid()}
        named |= {f"engine {e.kind.name} {e.process.pid}": e.process.pid for e in self._engines}
        seen = {name: look_at(pid) for name, pid in named.items()}
        # A driver's children are the engines and Ray.
        return {name: held for name, held in seen.items() if held is not None and name != "driver"}

    def run(self, faults: Sequence[Fault], seconds: float, show: Callable[[float], None]) -> None:
        """Sync every second, and have the faults come, for so many seconds; then until all is well again."""
        began = time.monotonic()
        storm = threading.Thread(target=self._strike_all, args=(faults, began), daemon=True)
        storm.start()
        while (left := began + seconds - time.monotonic()) > 0:
            show(seconds - left)
            step_began = time.monotonic()
            self._step()
            time.sleep(max(0.0, step_began + PERIOD_S - time.monotonic()))  # the period of the load itself
        storm.join(HANG_S)
        self._recover(time.monotonic() + RECOVER_S)

    def _recover(self, deadline: float) -> None:
        """No fault comes any more: every place has an engine, and one update reaches all of them."""
        while time.monotonic() < deadline:
            before = len(self.reports)
            self._step()
            if len(self.reports) > before and not self._coming and len(self._members()) == len(self._places):
                return
            time.sleep(0.2)  # between two tries; the loop has a deadline
        self.hangs.append(
            f"the group was not whole {RECOVER_S:.0f} s after the last fault: {len(self._members())} of "
            f"{len(self._places)} engines are members, {len(self._coming)} start; "
            f"last failure: {self._last_failure}"
        )

    @property
    def num_reconnects(self) -> int:
        """How often all engines connected anew: for another driver, or to read in another mode."""
        return self.faults["drop driver"] + self.faults["switch mode"]

    def _members(self) -> set[str]:
        return set(self._sync.engines) if self._sync else set()

    def _step(self) -> None:
        if not self._trainers.are_alive():
            try:
                self._timed("restart of the trainers", self._trainers.start)
            except (RdtError, ray.exceptions.RayError) as error:
                self._count("trainers", error)
                return
        self._tend_engines()
        self._sync_once()

    def _sync_once(self) -> None:
        # Another one whatever became of the last: some of the ranks may have published it.
        self.version += 1
        try:
            self._timed("step", lambda: self._trainers.step(self.version))
        except ray.exceptions.GetTimeoutError:
            self.hangs.append(f"a trainer rank did not end its step to version {self.version}")
            return
        except (RdtError, ray.exceptions.RayError) as error:
            self._count("step", error)
            return
        try:
            if self._wants_new_driver or self._sync is None:
                self._timed("connect", self._connect)
            sync = self._sync
            assert sync is not None
            report = self._timed(
                "update",
                lambda: sync.update(self.version, mode=self._mode, timeout_s=UPDATE_TIMEOUT_S),
            )
        except RdtError as error:
            self._count("", error)
        else:
            self.updates["done"] += 1
            self.reports.append(report.stall_s)

    def _count(self, what: str, error: Exception) -> None:
        """Something failed that may fail."""
        name = f"{what}: {reason_of(error)}" if what else reason_of(error)
        self.updates[name] += 1
        self._last_failure = f"{name}: {str(error).strip()[:160]}"
        self._say(f"version {self.version}: {self._last_failure}")

    def _connect(self) -> None:
        self._wants_new_driver = False
        old, self._sync = self._sync, None
        if old is not None:
            # It says nothing to anyone; what a process that was killed had open, the kernel closes.
            for member in old._members.values():
                member.close()
        urls = [engine.url for engine in self._engines if engine.is_alive and engine.is_ready()]
        # Engines of one kind land alike, and read together.
        options: dict[str, Any] = {"mode": self._mode, "fan_out": "always"}
        self._sync = WeightSync.connect(GROUP, urls, timeout_s=CONNECT_TIMEOUT_S, **options)

    def _tend_engines(self) -> None:
        """Part with engines that died, start others, and take up those that are ready and no members."""
        for place, engine in enumerate(self._engines):
            if place not in self._coming and not engine.is_alive:
                self.loads[place].aim(None)
                self._leave(engine)
                self._coming[place] = self._new_engine(engine.kind.name)
            elif place not in self._coming and engine.url not in self._members() and engine.is_ready():
                # It did not answer when this driver connected.
                self._take_up(engine)
        for place, engine in list(self._coming.items()):
            if not engine.is_alive:
                self._coming[place] = self._new_engine(engine.kind.name)
            elif engine.is_ready() and self._take_up(engine):
                self._engines[place].stop()
                self._engines[place] = self._coming.pop(place)
                self.loads[place].aim(engine)

    def _leave(self, engine: EngineProcess) -> None:
        sync = self._sync
        if sync is not None and engine.url in sync._members:
            self._timed("remove", lambda: sync.remove_engine(engine.url))

    def _take_up(self, engine: EngineProcess) -> bool:
        """Whether a new engine has become a member and serves a version."""
        sync = self._sync
        if sync is None:
            return False
        try:
            if engine.url not in sync._members:
                self._timed("add", lambda: sync.add_engine(engine.url, timeout_s=CONNECT_TIMEOUT_S))
        except RdtError as error:
            self._count("add", error)
            return False
        return sync._members[engine.url].version > 0

    def _timed(self, what: str, act: Callable[[], Any]) -> Any:
        began = self._call_began = time.monotonic()
        self.in_call = what
        try:
            return act()
        finally:
            self._call_began = None
            took_s = time.monotonic() - began
            self.longest_call_s = max(self.longest_call_s, took_s)
            if took_s > HANG_S:
                self.hangs.append(f"{what} took {took_s:.0f} s")

    @property
    def in_call_s(self) -> float:
        """How long the driver has been in the call that it is in."""
        began = self._call_began
        return time.monotonic() - began if began is not None else 0.0

    def _strike_all(self, faults: Sequence[Fault], began: float) -> None:
        for fault in faults:
            time.sleep(max(0.0, began + fault.at_s - time.monotonic()))  # the schedule that the seed gave
            with contextlib.suppress(ProcessLookupError, ValueError, RdtError, ray.exceptions.RayError):
                self._strike(fault)
                self.faults[fault.kind] += 1

    def _strike(self, fault: Fault) -> None:
        number = signal.SIGKILL if fault.kind.startswith("kill") else signal.SIGSTOP
        match fault.kind.split()[-1]:
            case "engine":
                engine = self._choose_engine(fault)
                self._say(f"{fault.kind} {engine.kind.name} {fault.lasts_s:.1f} s")
                engine.signal(number)
                if number == signal.SIGSTOP:
                    time.sleep(fault.lasts_s)  # that it stands still for so long is the fault itself
                    engine.signal(signal.SIGCONT)
            case "trainer":
                pids = self._trainers.pids
                if not pids:
                    raise ProcessLookupError("the trainers are being started")
                self._hit(pids[fault.target % len(pids)], number, fault)
            case "coordinator":
                actor = ray.get_actor(actor_name(GROUP), namespace=NAMESPACE)
                self._hit(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=5), number, fault)
            case "driver":
                self._say(fault.kind)
                self._wants_new_driver = True
            case "mode":
                self._mode = "inplace" if self._mode == "staged" else "staged"
                self._say(f"{fault.kind} to {self._mode}")

    def _choose_engine(self, fault: Fault) -> EngineProcess:
        """Engines that take a minute to start are stopped, but only plain ones are killed."""
        may = self._engines
        if fault.kind == "kill engine":
            may = [engine for engine in self._engines if engine.kind.name == "plain"] or may
        return may[fault.target % len(may)]

    def _hit(self, pid: int, number: int, fault: Fault) -> None:
        self._say(f"{fault.kind} {fault.lasts_s:.1f} s")
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(fault.lasts_s)  # the fault itself
            os.kill(pid, signal.SIGCONT)

    def stop_load(self) -> None:
        """Ask the engines no more, and wait for the answers under way."""
        for load in self.loads:
            load.stop()
        for load in self.loads:
            load.join(HANG_S)

    def close(self) -> None:
        """End every process. Idempotent."""
        self.stop_load()
        for engine in (*self._engines, *self._coming.values()):
            engine.stop()
        if self._sync is not None:
            self._sync.close()
        self._trainers.stop()
