"""The driver's half: one object that takes a group's engines from version to version."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rdt_core import choice, observer, ray_session, settings, tracing
from rdt_core.client import CoordinatorClient, RayChannel
from rdt_core.digest import RegionDigest, add_digests
from rdt_core.dtypes import itemsize_bytes
from rdt_core.engine_http import EngineHttp
from rdt_core.errors import (
    ClosedError,
    ConfigError,
    EngineError,
    InvalidVersionError,
    RdtError,
    StaleVersionError,
    UpdateFailedError,
)
from rdt_core.history import CoordinatorHistory
from rdt_core.mode import AUTO, INPLACE, STAGED
from rdt_core.report import LinkReport, RankReport, SyncFailure, SyncReport, VerifyReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from rdt_core.client import Channel
    from rdt_core.coordinator import Outcome
    from rdt_core.observer import SyncObserver

logger = logging.getLogger(__name__)

_TRAINERS_TIMEOUT_S = 5.0
_MAX_ENGINES_AT_ONCE = 64

_MARGIN_S = 5.0
"""What an engine gets on top of its own deadline, so that it is the engine's error that reaches the user."""


class WeightSync:
    """Drives the syncs of one group from trainers into running engines. Make one with :meth:`connect`.

    Lives in one driver process, not in the trainer ranks. All methods block and are called from one thread.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        engines: Sequence[EngineHttp],
        *,
        group: str = "",
        observers: Sequence[SyncObserver] = (),
    ) -> None:
        self._client = client
        self._group = group
        self._observers = (CoordinatorHistory(client), *observers)
        self._engines = tuple(engines)
        self._pool = ThreadPoolExecutor(max_workers=min(len(engines), _MAX_ENGINES_AT_ONCE))
        self._asked: dict[str, Any] = {}
        self._members: dict[str, list[dict[str, Any]]] = {}
        self._held: dict[str, int] = {}
        self._version = 0
        self._is_closed = False

    @classmethod
    def connect(
        cls,
        group: str,
        engines: Sequence[str],
        *,
        api_key: str | None = None,
        transport: str = choice.AUTO,
        mode: str = AUTO,
        timeout_s: float = 120.0,
        observers: Sequence[SyncObserver] = (),
        channel: Channel | None = None,
    ) -> WeightSync:
        """Bring trainers and engines together: every engine rank plans its reads and opens its links.

        Called once, after every trainer rank has attached. Generation in an engine stands for the seconds
        that this takes. If one engine fails, none stays connected, and all serve what they served.

        Args:
            group: the name under which the trainer ranks attached.
            engines: URLs of the engine servers, ``"http://127.0.0.1:8000"``.
            api_key: of the engine servers, if they have one.
            transport: name of the transport for every link; by default the one that ``RDT_TRANSPORT`` forces,
                else for each link the best that both sides offer (:mod:`rdt_core.choice`).
            mode: ``"staged"`` reads beside the parameters while generation goes on; ``"inplace"`` needs no
                memory for that, and holds generation while it reads into them; ``"auto"`` takes the first
                in every engine rank with room for it.
            timeout_s: for each engine's connect, in seconds.
            observers: are told about every sync; metrics for instance.
            channel: how to reach the coordinator; by default the group's named Ray actor.

        Raises:
            NoRayClusterError, RayAuthError: this driver, or an engine, cannot join Ray.
            UnknownGroupError: no trainer has attached under this name.
            MissingTrainerRankError: some rank has not attached after 5 seconds.
            EngineUnreachableError: an address does not answer.
            EngineRefusedError: an engine was not started with ``--weight-sync rdt``, or wants a key.
            ModelMismatchError, PlanError: trainer and engine do not run the same model.
            TransportUnavailableError: no transport fits a link.
            TransportLiesError: a link brought other bytes than the trainer's.
        """
        if not engines or len(set(engines)) != len(engines):
            raise ConfigError(f"engines must be one or more different URLs, got {list(engines)!r}.")
        where = ray_session.RayAddress("")
        if channel is None:
            ray_session.join()
            channel, where = RayChannel.find(group), ray_session.current_address()
        client = CoordinatorClient(channel)
        client.manifests(_TRAINERS_TIMEOUT_S)
        reached = [EngineHttp(url, api_key=api_key) for url in engines]
        sync = cls(client, reached, group=group, observers=observers)
        try:
            forced = transport if transport != choice.AUTO else settings.read_transport()
            sync._connect_all(where, forced, mode, timeout_s)
        except RdtError:
            sync.close()
            raise
        observer.tell(sync._observers, lambda told: told.on_connected(group, sync.engines))
        return sync

    @property
    def version(self) -> int:
        """The version that every engine serves; 0 before the first update."""
        return self._version

    @property
    def engines(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """What every engine rank answered to connect (tensors, bytes, reads, reload), by URL."""
        return self._members

    def update(
        self,
        version: int,
        *,
        mode: str | None = None,
        verify: str | None = None,
        kv_cache: str = "recompute",
        timeout_s: float = 120.0,
    ) -> SyncReport:
        """Bring every engine to ``version``; generation stands only while a rank copies locally.

        Waits until every trainer rank has published, has all engine ranks read, and commits when all have
        read everything. The trainer must not write its parameters before this returns. Engines that an
        earlier, failed call left at ``version`` are not asked again.

        Args:
            version: as given to ``publisher.publish``; greater than the last one.
            mode: from this update on, ``"staged"`` or ``"inplace"`` for all engines; those connected in the
                other one are connected again first, which takes seconds. By default each rank's own.
            verify: ``"digest"`` compares what every rank read with what the trainer ranks hold then, so that
                a write in mid-read without a word to us is an error. Reads the bytes once more on each side.
            kv_cache: ``"recompute"`` drops what the old weights left in the KV cache and recomputes running
                requests; ``"keep"`` leaves it.
            timeout_s: for each phase, in seconds.

        Raises:
            InvalidVersionError, StaleVersionError: the version is not greater than the last.
            NotPublishedError: a trainer rank has not published it.
            ConfigError: there is no such mode.
            UpdateFailedError: reading or committing failed on a rank; ``__cause__`` has its typed error. In
                in-place mode an engine that failed to commit may be torn: it refuses to generate until an
                update succeeds.
            EngineError: an engine does not answer.
            ClosedError: this object was closed.
        """
        if self._is_closed:
            raise ClosedError("sync")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise InvalidVersionError(version)
        if version <= self._version:
            raise StaleVersionError(version, self._version, "synced")
        if verify not in (None, "digest"):
            raise ConfigError(f"verify {verify!r} is not 'digest'. Leave it out to trust the trainer.")
        if mode not in (None, STAGED, INPLACE):
            raise ConfigError(f"mode {mode!r} is neither {STAGED!r} nor {INPLACE!r}. Leave it out.")
        progress = _Progress(version)
        try:
            with tracing.span("rdt.sync", group=self._group, version=version):
                report = self._run_phases(progress, mode, _Options(kv_cache, verify, timeout_s))
        except RdtError as error:
            failure = progress.failure(error)
            observer.tell(self._observers, lambda told: told.on_failed(self._group, failure))
            raise
        self._version = version
        observer.tell(self._observers, lambda told: told.on_synced(self._group, report))
        logger.info(
            "version %d: %d bytes, prepare %.3f s, commit %.3f s, stall %.3f s",
            version,
            report.nbytes,
            report.prepare_s,
            report.commit_s,
            report.stall_s,
        )
        return report

    def verify(self, *, timeout_s: float = 600.0) -> VerifyReport:
        """Compare every byte of every tensor in every engine with the trainer's, by digests made in both.

        Called between an update and the trainer's next write. Nothing passes but digests; reads all weights
        once on each side, so it takes seconds for a billion parameters and holds generation meanwhile.

        Raises:
            EngineError, DeadlineError: a side does not answer.
            RdtError: a side cannot digest.
        """
        started = time.perf_counter()
        mismatched: list[str] = []
        unverified: set[str] = set()
        num_tensors = nbytes = 0
        answers = self._each("digest", {}, timeout_s)
        for url, answer in answers.items():
            held = add_digests(_region_digests(answer))
            dtypes = {d["tensor"]: d["dtype"] for rank in answer["ranks"] for d in rank["digests"]}
            trained = self._trainer_digests(dtypes, timeout_s)
            mismatched += [f"{url}: {name}" for name in sorted(held) if held[name] != trained.get(name)]
            mismatched += [f"{url}: {name}" for name, (_, _, agree) in sorted(held.items()) if not agree]
            unverified |= {name for rank in answer["ranks"] for name in rank["unverified"]}
            num_tensors = len(held)
            nbytes = sum(count * itemsize_bytes(dtypes[name]) for name, (_, count, _) in held.items())
        return VerifyReport(
            version=self._version,
            num_tensors=num_tensors,
            nbytes=nbytes,
            mismatched=tuple(dict.fromkeys(mismatched)),
            unverified=tuple(sorted(unverified)),
            seconds=time.perf_counter() - started,
        )

    def status(self) -> dict[str, Any]:
        """Plain values about the group's trainers and engines."""
        return self._client.status()

    def close(self) -> None:
        """Disconnect every engine; they keep serving what they committed. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for url in list(self._members):
            engine = next(engine for engine in self._engines if engine.url == url)
            try:
                engine.call("disconnect", {}, timeout_s=_TRAINERS_TIMEOUT_S)
            except RdtError as error:
                logger.debug("engine %s did not disconnect: %s", url, error)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for engine in self._engines:
            engine.close()
        observer.tell(self._observers, lambda told: told.on_closed(self._group))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_phases(self, progress: _Progress, mode: str | None, options: _Options) -> SyncReport:
        version = progress.version
        with progress.enter("publish_wait"):
            self._client.wait_published(version, options.timeout_s)
        with progress.enter("prepare"):
            if mode is not None:
                self._ensure_mode(mode)
            behind = [engine for engine in self._engines if self._held.get(engine.url, 0) < version]
            self._prepare_all(behind, version, options)
        with progress.enter("commit"):
            answers = self._commit_all(behind, version, options)
        return _make_report(progress, answers)

    def _connect_all(
        self, where: ray_session.RayAddress, transport: str, mode: str, timeout_s: float
    ) -> None:
        self._asked = {
            "group": self._group,
            "ray_address": where.address,
            "ray_auth_mode": where.auth_mode,
            "transport": transport,
            "mode": mode,
            "timeout_s": timeout_s,
        }
        self._on_all(self._connect_one)

    def _connect_one(self, engine: EngineHttp) -> None:
        payload = {**self._asked, "engine": engine.url}
        answer = engine.call("connect", payload, timeout_s=float(self._asked["timeout_s"]))
        self._members[engine.url] = answer["ranks"]

    def _ensure_mode(self, mode: str) -> None:
        """Connect again every engine with a rank that reads in another mode; generation there stands."""
        self._asked["mode"] = mode

        def ensure(engine: EngineHttp) -> None:
            if any(rank["mode"] != mode for rank in self._members[engine.url]):
                self._connect_one(engine)

        self._on_all(ensure)

    def _prepare_all(self, engines: Sequence[EngineHttp], version: int, options: _Options) -> None:
        attempt, timeout_s = f"{version}:{uuid.uuid4().hex}", options.timeout_s
        payload = {"version": version, "attempt": attempt, **options.for_reading()}
        members = [(e.url, int(rank["rank"])) for e in engines for rank in self._members[e.url]]
        try:
            self._each("prepare", payload, timeout_s, engines)
            outcomes = self._client.wait_prepared(attempt, members, timeout_s + _MARGIN_S)
            _raise_first_failure(version, outcomes)
        except RdtError:
            self._abort_all()
            raise

    def _commit_all(
        self, engines: Sequence[EngineHttp], version: int, options: _Options
    ) -> dict[str, dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = {}
        payload = {"version": version, "kv_cache": options.kv_cache, **options.for_reading()}

        def commit(engine: EngineHttp) -> None:
            try:
                answers[engine.url] = engine.call("commit", payload, timeout_s=options.timeout_s + _MARGIN_S)
            except EngineError:
                raise
            except RdtError as error:
                raise UpdateFailedError(version, "commit", engine.url, -1, str(error)) from error
            self._held[engine.url] = version

        self._on_all(commit, engines)
        return answers

    def _abort_all(self) -> None:
        for engine in self._engines:
            try:
                engine.call("abort", {}, timeout_s=_TRAINERS_TIMEOUT_S)
            except RdtError as error:
                logger.warning("engine %s did not abort: %s", engine.url, error)

    def _each(
        self,
        method: str,
        payload: dict[str, Any],
        timeout_s: float,
        engines: Sequence[EngineHttp] | None = None,
    ) -> dict[str, dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = {}

        def call(engine: EngineHttp) -> None:
            answers[engine.url] = engine.call(method, payload, timeout_s=timeout_s)

        self._on_all(call, engines)
        return answers

    def _on_all(self, act: Callable[[EngineHttp], None], engines: Sequence[EngineHttp] | None = None) -> None:
        """Act on engines, by default every one, at once; wait for all, then raise the first error."""
        futures = [self._pool.submit(act, e) for e in (self._engines if engines is None else engines)]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def _trainer_digests(self, dtypes: dict[str, str], timeout_s: float) -> dict[str, tuple[int, int, bool]]:
        ranks = [int(rank) for rank in self._client.status()["trainers"]]
        answers = self._client.ask("digest", dict.fromkeys(ranks, dtypes), timeout_s)
        return add_digests(digest for answer in answers.values() for digest in answer)


def _raise_first_failure(version: int, outcomes: Mapping[tuple[str, int], Outcome]) -> None:
    for (url, rank), outcome in sorted(outcomes.items()):
        if outcome.error is not None:
            raise UpdateFailedError(version, "prepare", url, rank, str(outcome.error)) from outcome.error


@dataclass(frozen=True, slots=True)
class _Options:
    """What an update was asked for."""

    kv_cache: str
    verify: str | None
    timeout_s: float

    def for_reading(self) -> dict[str, Any]:
        """The part of a control request that says how to read."""
        asked = {"timeout_s": self.timeout_s, **_trace_context()}
        return asked if self.verify is None else {**asked, "verify": self.verify}


class _Progress:
    """Where a running sync is, and how long each phase took."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.phase = ""
        self.seconds: dict[str, float] = {}
        self.started_unix_s = time.time()
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def enter(self, phase: str) -> Iterator[None]:
        self.phase = phase
        started = time.perf_counter()
        with tracing.span(f"rdt.{phase}", version=self.version):
            yield
        self.seconds[phase] = time.perf_counter() - started

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self._started

    def failure(self, error: RdtError) -> SyncFailure:
        reason = error.__cause__ if isinstance(error.__cause__, RdtError) else error
        return SyncFailure(
            version=self.version,
            phase=self.phase,
            error_type=type(reason).__name__,
            message=str(error),
            engine=str(getattr(error, "engine", "")),
            rank=int(getattr(error, "rank", -1)),
            started_unix_s=self.started_unix_s,
            seconds=self.total_s,
        )


def _trace_context() -> dict[str, str]:
    traceparent = tracing.traceparent()
    return {"traceparent": traceparent} if traceparent else {}


def _make_report(progress: _Progress, answers: Mapping[str, Mapping[str, Any]]) -> SyncReport:
    rows = [
        _make_rank_report(url, rank) for url, answer in sorted(answers.items()) for rank in answer["ranks"]
    ]
    return SyncReport(
        version=progress.version,
        num_tensors=max(rank["num_tensors"] for answer in answers.values() for rank in answer["ranks"]),
        nbytes=sum(row.nbytes for row in rows),
        publish_wait_s=progress.seconds["publish_wait"],
        prepare_s=progress.seconds["prepare"],
        commit_s=max(row.commit_s for row in rows),
        stall_s=max(float(answer["stall_s"]) for answer in answers.values()),
        total_s=progress.total_s,
        ranks=tuple(rows),
        started_unix_s=progress.started_unix_s,
    )


def _make_rank_report(engine: str, rank: Mapping[str, Any]) -> RankReport:
    return RankReport(
        engine=engine,
        rank=int(rank["rank"]),
        mode=rank.get("mode", STAGED),
        nbytes=rank["nbytes"],
        read_nbytes=rank["read_nbytes"],
        num_reads=rank["num_reads"],
        prepare_s=rank["prepare_s"],
        commit_s=rank["commit_s"],
        transports={int(trainer): name for trainer, name in rank["trainers"].items()},
        prepare_started_unix_s=float(rank.get("prepare_started_unix_s", 0.0)),
        commit_started_unix_s=float(rank.get("commit_started_unix_s", 0.0)),
        links=tuple(LinkReport(**link) for link in rank.get("links", ())),
    )


def _region_digests(answer: Mapping[str, Any]) -> list[RegionDigest]:
    return [
        RegionDigest(**{**digest, "start": tuple(digest["start"]), "stop": tuple(digest["stop"])})
        for rank in answer["ranks"]
        for digest in rank["digests"]
    ]
