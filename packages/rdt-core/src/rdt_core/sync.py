"""The driver's half: one object that takes a group's engines from version to version."""

from __future__ import annotations

import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

from rdt_core import ray_session
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
from rdt_core.report import RankReport, SyncReport, VerifyReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from rdt_core.coordinator import Outcome

logger = logging.getLogger(__name__)

_TRAINERS_TIMEOUT_S = 5.0
_MAX_ENGINES_AT_ONCE = 64


class WeightSync:
    """Drives the syncs of one group from trainers into running engines. Make one with :meth:`connect`.

    Lives in one driver process, not in the trainer ranks. All methods block and are called from one thread.
    """

    def __init__(self, client: CoordinatorClient, engines: Sequence[EngineHttp]) -> None:
        self._client = client
        self._engines = tuple(engines)
        self._pool = ThreadPoolExecutor(max_workers=min(len(engines), _MAX_ENGINES_AT_ONCE))
        self._members: dict[str, list[dict[str, Any]]] = {}
        self._version = 0
        self._is_closed = False

    @classmethod
    def connect(
        cls,
        group: str,
        engines: Sequence[str],
        *,
        api_key: str | None = None,
        transport: str = "nixl",
        timeout_s: float = 120.0,
    ) -> WeightSync:
        """Bring trainers and engines together: every engine rank plans its reads and opens its links.

        Called once, after every trainer rank has attached. Generation in an engine stands for the seconds
        that this takes. If one engine fails, none stays connected, and all serve what they served.

        Args:
            group: the name under which the trainer ranks attached.
            engines: URLs of the engine servers, ``"http://127.0.0.1:8000"``.
            api_key: of the engine servers, if they have one.
            transport: name of the transport for every link.
            timeout_s: for each engine's connect, in seconds.

        Raises:
            NoRayClusterError, RayAuthError: this driver, or an engine, cannot join Ray.
            UnknownGroupError: no trainer has attached under this name.
            MissingTrainerRankError: some rank has not attached after 5 seconds.
            EngineUnreachableError: an address does not answer.
            EngineRefusedError: an engine was not started with ``--weight-sync rdt``, or wants a key.
            ModelMismatchError, PlanError: trainer and engine do not run the same model.
        """
        if not engines or len(set(engines)) != len(engines):
            raise ConfigError(f"engines must be one or more different URLs, got {list(engines)!r}.")
        ray_session.join()
        client = CoordinatorClient(RayChannel.find(group))
        client.manifests(_TRAINERS_TIMEOUT_S)
        sync = cls(client, [EngineHttp(url, api_key=api_key) for url in engines])
        try:
            sync._connect_all(group, transport, timeout_s)
        except RdtError:
            sync.close()
            raise
        return sync

    @property
    def version(self) -> int:
        """The version that every engine serves; 0 before the first update."""
        return self._version

    @property
    def engines(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """What every engine rank answered to connect (tensors, bytes, reads, reload), by URL."""
        return self._members

    def update(self, version: int, *, kv_cache: str = "recompute", timeout_s: float = 120.0) -> SyncReport:
        """Bring every engine to ``version``; generation stands only while a rank copies locally.

        Waits until every trainer rank has published, has all engine ranks read, and commits when all have
        read everything. The trainer must not write its parameters before this returns.

        Args:
            version: as given to ``publisher.publish``; greater than the last one.
            kv_cache: ``"recompute"`` drops what the old weights left in the KV cache and recomputes running
                requests; ``"keep"`` leaves it.
            timeout_s: for each phase, in seconds.

        Raises:
            InvalidVersionError, StaleVersionError: the version is not greater than the last.
            NotPublishedError: a trainer rank has not published it.
            UpdateFailedError: reading or committing failed on a rank; ``__cause__`` has its typed error.
            EngineError: an engine does not answer.
            ClosedError: this object was closed.
        """
        if self._is_closed:
            raise ClosedError("sync")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise InvalidVersionError(version)
        if version <= self._version:
            raise StaleVersionError(version, self._version, "synced")
        started = time.perf_counter()
        self._client.wait_published(version, timeout_s)
        published = time.perf_counter()
        self._prepare_all(version, timeout_s)
        prepared = time.perf_counter()
        answers = self._commit_all(version, kv_cache, timeout_s)
        self._version = version
        report = _make_report(version, answers, started, published, prepared)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect_all(self, group: str, transport: str, timeout_s: float) -> None:
        where = ray_session.current_address()

        def connect(engine: EngineHttp) -> None:
            payload = {
                "group": group,
                "engine": engine.url,
                "ray_address": where.address,
                "ray_auth_mode": where.auth_mode,
                "transport": transport,
                "timeout_s": timeout_s,
            }
            self._members[engine.url] = engine.call("connect", payload, timeout_s=timeout_s)["ranks"]

        self._on_all(connect)

    def _prepare_all(self, version: int, timeout_s: float) -> None:
        attempt = f"{version}:{uuid.uuid4().hex}"
        payload = {"version": version, "attempt": attempt, "timeout_s": timeout_s}
        members = [(url, int(rank["rank"])) for url, ranks in self._members.items() for rank in ranks]
        try:
            self._each("prepare", payload, timeout_s)
            outcomes = self._client.wait_prepared(attempt, members, timeout_s)
            _raise_first_failure(version, outcomes)
        except RdtError:
            self._abort_all()
            raise

    def _commit_all(self, version: int, kv_cache: str, timeout_s: float) -> dict[str, dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = {}

        def commit(engine: EngineHttp) -> None:
            payload = {"version": version, "kv_cache": kv_cache}
            try:
                answers[engine.url] = engine.call("commit", payload, timeout_s=timeout_s)
            except EngineError:
                raise
            except RdtError as error:
                raise UpdateFailedError(version, "commit", engine.url, -1, str(error)) from error

        self._on_all(commit)
        return answers

    def _abort_all(self) -> None:
        for engine in self._engines:
            try:
                engine.call("abort", {}, timeout_s=_TRAINERS_TIMEOUT_S)
            except RdtError as error:
                logger.warning("engine %s did not abort: %s", engine.url, error)

    def _each(self, method: str, payload: dict[str, Any], timeout_s: float) -> dict[str, dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = {}

        def call(engine: EngineHttp) -> None:
            answers[engine.url] = engine.call(method, payload, timeout_s=timeout_s)

        self._on_all(call)
        return answers

    def _on_all(self, act: Callable[[EngineHttp], None]) -> None:
        """Act on every engine at once; wait for all, then raise the first error."""
        futures = [self._pool.submit(act, engine) for engine in self._engines]
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


def _make_report(
    version: int, answers: Mapping[str, Mapping[str, Any]], started: float, published: float, prepared: float
) -> SyncReport:
    ended = time.perf_counter()
    rows = [
        RankReport(
            engine=url,
            rank=int(rank["rank"]),
            nbytes=rank["nbytes"],
            read_nbytes=rank["read_nbytes"],
            num_reads=rank["num_reads"],
            prepare_s=rank["prepare_s"],
            commit_s=rank["commit_s"],
            transports={int(trainer): name for trainer, name in rank["trainers"].items()},
        )
        for url, answer in sorted(answers.items())
        for rank in answer["ranks"]
    ]
    return SyncReport(
        version=version,
        num_tensors=max(rank["num_tensors"] for answer in answers.values() for rank in answer["ranks"]),
        nbytes=sum(row.nbytes for row in rows),
        publish_wait_s=published - started,
        prepare_s=prepared - published,
        commit_s=max(row.commit_s for row in rows),
        stall_s=max(float(answer["stall_s"]) for answer in answers.values()),
        total_s=ended - started,
        ranks=tuple(rows),
    )


def _region_digests(answer: Mapping[str, Any]) -> list[RegionDigest]:
    return [
        RegionDigest(**{**digest, "start": tuple(digest["start"]), "stop": tuple(digest["stop"])})
        for rank in answer["ranks"]
        for digest in rank["digests"]
    ]
