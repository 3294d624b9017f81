"""A group that outlives many faults: two engines, two trainer ranks, and a driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import httpx
import ray

from rdt_core import WeightSync
from rdt_core.client import actor_name
from rdt_core.ray_session import NAMESPACE
from tests.contract.world import expected_fingerprint
from tests.faults.cells import UPDATE_TIMEOUT_S
from tests.faults.driver_process import ANSWER, reason_of
from tests.faults.faulty_trainer import start_faulty_trainers
from tests.integration.conftest import ROOT, START_TIMEOUT_S
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.conftest import GatedEngine


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=START_TIMEOUT_S)


class Call(threading.Thread):
    """Something that blocks, in a thread: what it raised, and when it ended."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._act = act
        self.error: BaseException | None = None
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        try:
            self._act()
        except BaseException as error:  # noqa: BLE001  whatever it is, the test compares its type
            self.error = error
        self.ended = time.monotonic()

    def finish(self) -> str:
        """The type of the reason; empty when it succeeded."""
        self.join(START_TIMEOUT_S)
        assert not self.is_alive(), "it hangs"
        return reason_of(self.error) if self.error else ""


class DriverProcess:
    """A driver as a process of its own, see ``driver_process``."""

    def __init__(self, group: str, engines: list[str], address: str) -> None:
        command = [sys.executable, "-m", "tests.faults.driver_process", group, *engines]
        env = {**os.environ, "RAY_ADDRESS": address}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def hear(self) -> str:
        """The next answer; empty when the process ended first."""
        assert self.process.stdout is not None
        answers = (line for line in self.process.stdout if line.startswith(ANSWER))
        return next(answers, "").removeprefix(ANSWER).strip()

    def end(self) -> None:
        self.process.kill()
        with contextlib.suppress(OSError):
            self.process.communicate(timeout=START_TIMEOUT_S)


class Stage:
    """What every cell acts on. A cell that fails leaves it unsound, and the next one gets a new group.

    Args:
        address: of the Ray cluster.
        start_engine: an engine process, not yet awaited.
    """

    def __init__(self, address: str, start_engine: Callable[[], GatedEngine]) -> None:
        self.address, self._start_engine = address, start_engine
        self.engines: list[GatedEngine] = []
        self.group = ""
        self.version = 0
        self.is_sound = False
        self.ranks: list[Any] = []
        self.pids: list[int] = []
        self._sync: WeightSync | None = None
        self.make_ranks: Callable[[], list[Any]] = lambda: start_faulty_trainers(2)

    @property
    def urls(self) -> list[str]:
        return [engine.url for engine in self.engines]

    def begin(self, mode: str) -> None:
        """Every engine serves ``self.version``, and a driver is connected."""
        if not self.is_sound:
            self._start_anew()
        if self._sync is None:
            self._sync = WeightSync.connect(self.group, self.urls, mode=mode)
        self.is_sound = False
        self.version += 1
        self.publish(self.version)
        self.sync.update(self.version, mode=mode)

    def _start_anew(self) -> None:
        self.leave()
        for engine in self.engines:
            engine.stop()
        self.engines = [self._start_engine(), self._start_engine()]
        self.group, self.version = f"faults-{uuid.uuid4().hex[:8]}", 0
        self.start_trainers()
        for engine in self.engines:
            engine.wait_until_ready()

    @property
    def sync(self) -> WeightSync:
        assert self._sync is not None
        return self._sync

    def connect(self, mode: str) -> None:
        """With the deadline that the cells state, unlike :meth:`begin`."""
        self._sync = WeightSync.connect(self.group, self.urls, mode=mode, timeout_s=UPDATE_TIMEOUT_S)

    def leave(self) -> None:
        """Close this process's driver, if there is one."""
        sync, self._sync = self._sync, None
        if sync is not None:
            sync.close()

    def start_trainers(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = self.make_ranks()
        self.pids = get([rank.attach.remote(self.group) for rank in self.ranks])

    def write(self, version: int) -> None:
        get([rank.write.remote(version) for rank in self.ranks])

    def publish(self, version: int) -> None:
        self.write(version)
        get([rank.publish.remote(version) for rank in self.ranks])

    def replace_engine(self) -> None:
        """Another engine for the first, which a running driver lets go and takes up."""
        old, new = self.engines[0], self._start_engine()
        new.wait_until_ready()
        self.engines[0] = new
        if self._sync is not None:
            self._sync.remove_engine(old.url)
            self._sync.add_engine(new.url)
        old.stop()

    def coordinator(self) -> Any:
        return ray.get_actor(actor_name(self.group), namespace=NAMESPACE)

    def coordinator_pid(self) -> int:
        return int(get(self.coordinator().__ray_call__.remote(lambda _: os.getpid())))

    def served(self, engine: GatedEngine, *versions: int) -> str:
        """Which of these versions an engine serves: ``old``, ``new``, another, or ``nothing`` if torn."""
        answer = httpx.get(f"{engine.url}/fingerprint", timeout=START_TIMEOUT_S)
        if not answer.is_success:
            assert answer.json()["error"]["type"] == "EngineTornError"
            return "nothing"
        names = dict(zip(versions, ("old", "new"), strict=False))
        held = next(v for v in range(self.version + 3, -1, -1) if answer.json() == expected_fingerprint(v))
        return names.get(held, str(held))

    def check_all_serve(self, version: int) -> None:
        for engine in self.engines:
            answer = httpx.get(f"{engine.url}/fingerprint", timeout=START_TIMEOUT_S)
            assert answer.json() == expected_fingerprint(version)
        self.version, self.is_sound = version, True

    def close(self) -> None:
        self.leave()
        for rank in self.ranks:
            ray.kill(rank)


def break_once(coordinator: Any, name: str) -> None:
    """Have a coordinator's method raise what it never should, when it is next called. Blocks until set."""

    def patch(actor: Any) -> None:
        def broken(*args: Any) -> Any:
            delattr(actor, name)
            if name.startswith("_"):
                raise RuntimeError(f"{name} raised, as a test wanted")

            async def fail() -> None:
                raise RuntimeError(f"{name} raised, as a test wanted")

            del args
            return fail()

        setattr(actor, name, broken)

    get(coordinator.__ray_call__.remote(patch))


def wait_until_stopped(pid: int) -> None:
    """Until the kernel has stopped a process."""
    from pathlib import Path

    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT")


def resume_later(pid: int, at: float) -> threading.Timer:
    """SIGCONT for a process at a time of the monotonic clock."""
    timer = threading.Timer(max(0.0, at - time.monotonic()), os.kill, (pid, signal.SIGCONT))
    timer.daemon = True
    timer.start()
    return timer
