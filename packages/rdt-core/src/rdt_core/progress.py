"""Where a running sync is, how long each phase took, and the records that come of it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from rdt_core import tracing
from rdt_core.mode import STAGED
from rdt_core.report import LinkReport, RankReport, SyncFailure, SyncReport

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rdt_core.errors import RdtError, UpdateFailedError


class Progress:
    """The clock of one sync. Made when it begins."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.phase = ""
        self.seconds: dict[str, float] = {}
        self.arena_bytes = 0
        self.started_unix_s = time.time()
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def enter(self, phase: str) -> Iterator[None]:
        """Around one phase: ``publish_wait``, ``prepare`` or ``commit``."""
        self.phase = phase
        started = time.perf_counter()
        with tracing.span(f"rdt.{phase}", version=self.version):
            yield
        self.seconds[phase] = time.perf_counter() - started

    @property
    def total_s(self) -> float:
        """Seconds since the sync began."""
        return time.perf_counter() - self._started

    def failure(self, error: RdtError) -> SyncFailure:
        """The record of an error that ended the sync, or one engine's part of it."""
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return SyncFailure(
            version=self.version,
            phase=str(getattr(error, "phase", "") or self.phase),
            error_type=type(reason).__name__,
            message=str(error),
            engine=str(getattr(error, "engine", "")),
            rank=int(getattr(error, "rank", -1)),
            started_unix_s=self.started_unix_s,
            seconds=self.total_s,
        )

    def report(
        self, answers: Mapping[str, Mapping[str, Any]], failures: Sequence[UpdateFailedError]
    ) -> SyncReport:
        """The record of a sync that committed.

        Args:
            answers: of the engines that committed, by URL.
            failures: of the others, when each engine commits for itself.
        """
        ranks = [(url, rank) for url, answer in sorted(answers.items()) for rank in answer["ranks"]]
        rows = tuple(_make_row(url, rank) for url, rank in ranks)
        return SyncReport(
            version=self.version,
            num_tensors=max(rank["num_tensors"] for _, rank in ranks),
            nbytes=sum(row.nbytes for row in rows),
            publish_wait_s=self.seconds["publish_wait"],
            prepare_s=self.seconds["prepare"],
            commit_s=max(row.commit_s for row in rows),
            stall_s=max(float(answer["stall_s"]) for answer in answers.values()),
            total_s=self.total_s,
            ranks=rows,
            arena_bytes=self.arena_bytes,
            started_unix_s=self.started_unix_s,
            source=", ".join(sorted({row.source for row in rows})),
            failures=tuple(self.failure(error) for error in failures),
        )


def report_of_engine(ranks: Sequence[Mapping[str, Any]]) -> SyncReport:
    """The record of a sync as one engine can tell it, from its ranks' last commits of one version.

    What only the driver knows is zero: the wait for the trainers, and their arenas. ``total_s`` counts from
    the first read to the end of the last flip; ``stall_s`` is the commit where a rank does not know more.
    """
    rows = tuple(_make_row(str(rank["engine"]), rank) for rank in ranks)
    starts = [row.prepare_started_unix_s or row.commit_started_unix_s for row in rows]
    return SyncReport(
        version=int(ranks[0]["version"]),
        num_tensors=max(rank["num_tensors"] for rank in ranks),
        nbytes=sum(row.nbytes for row in rows),
        publish_wait_s=0.0,
        prepare_s=max(row.prepare_s for row in rows),
        commit_s=max(row.commit_s for row in rows),
        stall_s=max(float(rank.get("stall_s", rank["commit_s"])) for rank in ranks),
        total_s=max(row.commit_started_unix_s + row.commit_s for row in rows) - min(starts),
        ranks=rows,
        started_unix_s=min(starts),
    )


def trace_context() -> dict[str, str]:
    """What carries the current span into another process; empty without OpenTelemetry."""
    traceparent = tracing.traceparent()
    return {"traceparent": traceparent} if traceparent else {}


def _make_row(engine: str, rank: Mapping[str, Any]) -> RankReport:
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
        source=str(rank.get("source", "trainers")),
        neighbours_nbytes=int(rank.get("neighbours_nbytes", 0)),
        links=tuple(LinkReport(**link) for link in rank.get("links", ())),
    )
