"""One pair: a sync group's trainers and the engines that follow them, driven from one thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rdt_core.errors import ClosedError, RdtError
from rdt_core.gateway.errors import PairBusyError
from rdt_core.report import SyncFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rdt_core.gateway.trainers import TrainerWorkers
    from rdt_core.report import SyncReport
    from rdt_core.sync import WeightSync


MAX_HISTORY = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSpec:
    """What a client asked to bring together.

    Args:
        name: the client's name for it.
        group: the sync group; empty when the trainer workers tell it.
        engines: URLs of engine servers.
        trainer_workers: URLs of trainers' own apps; empty when the trainers publish by themselves.
    """

    name: str
    group: str
    engines: tuple[str, ...]
    trainer_workers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """A completed update.

    Args:
        report: what ``WeightSync.update`` returned.
        publish_s: until every trainer worker had published; 0 when the trainers publish by themselves.
        seconds: the whole update.
        topology: names the trainer processes that it began with.
    """

    report: SyncReport
    publish_s: float
    seconds: float
    topology: str


class PairNotes:
    """A :class:`rdt_core.observer.SyncObserver` that keeps how the last syncs of a pair ended."""

    def __init__(self) -> None:
        self._last: deque[SyncReport | SyncFailure] = deque(maxlen=MAX_HISTORY)

    @property
    def history(self) -> list[SyncReport | SyncFailure]:
        """Oldest first."""
        return list(self._last)

    def on_connected(self, group: str, engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Nothing to keep: the driver knows its engines."""

    def on_synced(self, group: str, report: SyncReport) -> None:
        """Keep it."""
        self._last.append(report)

    def on_failed(self, group: str, failure: SyncFailure) -> None:
        """Keep it."""
        self._last.append(failure)

    def on_closed(self, group: str) -> None:
        """Nothing to keep: the pair goes away."""


@dataclass(slots=True)
class _Running:
    version: int
    result: Future[UpdateResult] = field(default_factory=Future)


class Pair:
    """Connects on creation; every call returns a future at once. Callable from any thread.

    Updates are idempotent by version: asked again for a version that is being synced, a caller gets the same
    future; for the version that was synced last, its result. A version that failed, if only on one engine, is
    tried again, and so is one of other trainer processes: they may give its number to other bytes.

    Args:
        spec: what to bring together.
        open_sync: connects a driver to a group; called in the pair's thread, with an observer to pass on.
        workers: the trainers' own routes, or None when the trainers publish by themselves.
        init_timeout_s: for connecting.
    """

    def __init__(
        self,
        spec: PairSpec,
        open_sync: Callable[[str, PairNotes], WeightSync],
        workers: TrainerWorkers | None,
        init_timeout_s: float,
    ) -> None:
        self.spec = spec
        self.group = spec.group
        self._open_sync = open_sync
        self._workers = workers
        self._init_timeout_s = init_timeout_s
        self._notes = PairNotes()
        self._failed_phase = ""
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._last: UpdateResult | None = None
        self._last_error: str | None = None
        self._closing: Future[None] | None = None
        self._sync: WeightSync | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"rdt-pair-{spec.name}")
        self.connected: Future[WeightSync] = self._thread.submit(self._connect)

    def update(
        self,
        version: int,
        *,
        mode: str | None = None,
        kv_cache: str = "recompute",
        timeout_s: float = 120.0,
    ) -> Future[UpdateResult]:
        """Begin to bring every engine to ``version``, or join the update to it that is under way.

        Args:
            version: the trainer's step.
            mode: as for ``WeightSync.update``.
            kv_cache: as for ``WeightSync.update``.
            timeout_s: for each phase.

        Raises:
            PairBusyError: another version is being synced.
            ClosedError: the pair is being disconnected.
        """
        with self._lock:
            if self._closing is not None:
                raise ClosedError(f"pair {self.spec.name!r}")
            running = self._running
            if running is not None and not running.result.done():
                if running.version != version:
                    raise PairBusyError(self.spec.name, running.version, version)
                return running.result
            result = self._thread.submit(self._update, version, mode, kv_cache, timeout_s)
            self._running = _Running(version, result)
            return result

    def close(self) -> Future[None]:
        """Begin to disconnect the engines and tear the trainers' workers down, after a running update.

        Idempotent: a second call returns the same future.
        """
        with self._lock:
            if self._closing is None:
                self._closing = self._thread.submit(self._disconnect)
                self._thread.shutdown(wait=False)
            return self._closing

    @property
    def is_closing(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closing is not None

    @property
    def failed_phase(self) -> str:
        """The phase in which the last update failed; empty when it did not, or its sync did not begin."""
        return self._failed_phase

    @property
    def last(self) -> UpdateResult | None:
        """The last completed update."""
        return self._last

    def describe(self) -> dict[str, Any]:
        """Plain values for people and tools: the fields of ``PairAnswer``."""
        running = self._running
        is_updating = running is not None and not running.result.done()
        return {
            "pair_name": self.spec.name,
            "group": self.group,
            "state": "updating" if is_updating else "connected" if self._sync else "connecting",
            "version": self._last.report.version if self._last else 0,
            "running_version": running.version if running is not None and is_updating else None,
            "engines": list(self.spec.engines),
            "trainer_workers": list(self.spec.trainer_workers),
            "last_error": self._last_error,
        }

    def history(self) -> list[SyncReport | SyncFailure]:
        """The last syncs, oldest first."""
        return self._notes.history

    def engine_ranks(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """What every engine rank answered to connect, by URL; empty while connecting."""
        return self._sync.engines if self._sync is not None else {}

    def status(self) -> dict[str, Any] | None:
        """What the group's coordinator says; None while connecting. Blocks for its answer.

        Raises:
            RdtError: the coordinator does not answer.
        """
        return self._sync.status() if self._sync is not None else None

    def _connect(self) -> WeightSync:
        try:
            if self._workers is not None:
                told = self._workers.learn_group(self._init_timeout_s)
                self.group = told
                self._workers.init(self.spec.name, len(self.spec.engines), self._init_timeout_s)
            self._sync = self._open_sync(self.group, self._notes)
        except RdtError:
            self._let_trainers_go()
            raise
        return self._sync

    def _update(self, version: int, mode: str | None, kv_cache: str, timeout_s: float) -> UpdateResult:
        sync = self.connected.result(timeout=0)
        started = time.perf_counter()
        self._failed_phase = ""
        try:
            topology = sync.topology()
            done = self._find_done(version, topology)
            if done is not None:
                return done
            if self._workers is not None:
                self._workers.publish(self.spec.name, version, timeout_s)
            published = time.perf_counter()
            report = sync.update(version, mode=mode, kv_cache=kv_cache, timeout_s=timeout_s)
        except RdtError as error:
            self._last_error = str(error)
            ended = self._notes.history[-1:]
            if ended and isinstance(ended[0], SyncFailure) and ended[0].version == version:
                self._failed_phase = ended[0].phase
            raise
        result = UpdateResult(
            report=report,
            publish_s=published - started,
            seconds=time.perf_counter() - started,
            topology=topology,
        )
        self._last, self._last_error = result, None
        return result

    def _find_done(self, version: int, topology: str) -> UpdateResult | None:
        """The last update, if it brought this version of these trainers to every engine."""
        last = self._last
        if last is None or (last.report.version, last.topology) != (version, topology):
            return None
        return None if last.report.failures else last

    def _disconnect(self) -> None:
        if self._sync is not None:
            self._sync.close()
        self._let_trainers_go()

    def _let_trainers_go(self) -> None:
        if self._workers is not None:
            self._workers.teardown(self.spec.name)
            self._workers.close()
            self._workers = None
