"""What a sync returns: seconds, bytes and outcomes, the same record that benchmarks and metrics use."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One engine rank's part of a sync.

    Args:
        engine: the engine's identity, its URL by default.
        rank: of the worker in its engine.
        nbytes: payload that landed in this rank.
        read_nbytes: bytes that crossed the link; more than ``nbytes`` where strided sources were read as
            spans.
        num_reads: one-sided copies.
        prepare_s: reading, while generation goes on.
        commit_s: local copies and recomputed derived tensors, while generation stands.
        transports: name of the transport by trainer rank.
    """

    engine: str
    rank: int
    nbytes: int
    read_nbytes: int
    num_reads: int
    prepare_s: float
    commit_s: float
    transports: dict[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One completed sync.

    Args:
        version: now served by every engine of the sync.
        num_tensors: checkpoint tensors that were synced.
        nbytes: payload summed over all engine ranks.
        publish_wait_s: until every trainer rank had published.
        prepare_s: from the request until the last rank had read everything.
        commit_s: the slowest rank's commit.
        stall_s: the longest time any engine held generation.
        total_s: the whole call.
        ranks: one row an engine rank.
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

    @property
    def gigabytes_per_s(self) -> float:
        """Payload over the time of ``prepare``."""
        return self.nbytes / self.prepare_s / 1e9 if self.prepare_s else 0.0

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
