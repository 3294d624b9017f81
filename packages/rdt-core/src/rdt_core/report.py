"""What a sync returns: seconds, bytes and outcomes, the same record that benchmarks and metrics use."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """What one engine rank read from one trainer rank in one sync.

    Args:
        trainer_rank: whose memory was read.
        transport: name of the transport that carried it.
        nbytes: that crossed the link.
        num_reads: one-sided copies.
        started_unix_s: by the engine's clock.
        seconds: from the first read to the last byte.
    """

    trainer_rank: int
    transport: str
    nbytes: int
    num_reads: int
    started_unix_s: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One engine rank's part of a sync.

    Args:
        engine: the engine's identity, its URL by default.
        rank: of the worker in its engine.
        mode: ``"staged"``, ``"pinned"`` or ``"inplace"``.
        nbytes: payload that landed in this rank.
        read_nbytes: bytes that crossed the link; more than ``nbytes`` where strided sources were read as
            spans.
        num_reads: one-sided copies.
        prepare_s: reading, while generation goes on; 0 in place.
        commit_s: local copies (in place: reads) and recomputed derived tensors, while generation stands.
        transports: name of the transport by trainer rank.
        prepare_started_unix_s: by the engine's clock; 0 when the engine does not say.
        commit_started_unix_s: by the engine's clock; 0 when the engine does not say.
        links: one row a rank that was read, in the order of reading.
        source: whence the bytes came: ``"trainers"``, or the engine that lent them, whose ranks are then what
            ``transports`` and ``links`` name.
        neighbours_nbytes: of ``read_nbytes``, what came from engine ranks of the same node, see
            :mod:`rdt_core.fan_out`.
    """

    engine: str
    rank: int
    mode: str
    nbytes: int
    read_nbytes: int
    num_reads: int
    prepare_s: float
    commit_s: float
    transports: dict[int, str]
    prepare_started_unix_s: float = 0.0
    commit_started_unix_s: float = 0.0
    links: tuple[LinkReport, ...] = ()
    source: str = "trainers"
    neighbours_nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One completed sync.

    Args:
        version: now served by every engine of the sync.
        num_tensors: checkpoint tensors that were synced.
        nbytes: payload summed over all engine ranks.
        publish_wait_s: until every trainer rank had published.
        prepare_s: from then until the last rank had read everything.
        commit_s: the slowest rank's commit.
        stall_s: the longest time any engine held generation.
        total_s: the whole call.
        ranks: one row an engine rank.
        arena_bytes: what all trainer ranks hold beside their parameters for engines that read them packed or
            cast; 0 when nothing needs it.
        started_unix_s: when the driver began, by its clock.
        failures: of engines that serve what they served before; only with ``commit_policy="engine"``.
        source: whence the bytes came: ``"trainers"``, or for an engine that joined, the one that lent them.
    """

    version: int
    num_tensors: int
    nbytes: int
    publish_wait_s: float
    prepare_s: float
    commit_s: float
    stall_s: float
    total_s: float
    ranks: tuple[RankReport, ...]
    arena_bytes: int = 0
    started_unix_s: float = 0.0
    failures: tuple[SyncFailure, ...] = ()
    source: str = "trainers"

    @property
    def gigabytes_per_s(self) -> float:
        """Payload over the time of ``prepare``."""
        return self.nbytes / self.prepare_s / 1e9 if self.prepare_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncFailure:
    """One sync that ended without a commit, or one engine's part of a sync that others committed.

    Args:
        version: that was to be served.
        phase: ``"publish_wait"``, ``"prepare"`` or ``"commit"``.
        error_type: name of the error's class in ``rdt_core.errors``.
        message: the error's text.
        engine: where it failed; empty when no engine is to blame.
        rank: of the worker in that engine; -1 when no single rank is to blame.
        started_unix_s: when the driver began, by its clock.
        seconds: until the error.
    """

    version: int
    phase: str
    error_type: str
    message: str
    engine: str
    rank: int
    started_unix_s: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Digests of every tensor in the trainer against those in one or more engines.

    Args:
        version: that both sides held.
        num_tensors: compared.
        nbytes: compared, in the engine's dtype, one engine.
        mismatched: tensors whose bytes differ, as ``"engine: tensor"``.
        unverified: tensors that an engine keeps in another form only and that were not compared.
        seconds: for all digests.
    """

    version: int
    num_tensors: int
    nbytes: int
    mismatched: tuple[str, ...]
    unverified: tuple[str, ...]
    seconds: float

    @property
    def bytes_equal(self) -> bool:
        """Whether every tensor was compared and every byte is equal."""
        return not self.mismatched and not self.unverified and self.num_tensors > 0
