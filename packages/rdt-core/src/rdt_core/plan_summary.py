"""What a set of plans amounts to: bytes by rank and by way of reading, balance, memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import is_contiguous

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rdt_core.manifest import Manifest
    from rdt_core.plan import Copy, Plan

REASONS = {
    "direct": "contiguous on the trainer, one dtype on both sides",
    "strided": "columns of a row-major matrix: read as runs or as the span around them, whichever costs less",
    "cast": "the dtypes differ: converted when it is committed",
    "strided cast": "columns, and the dtypes differ",
}
"""Ways in which bytes land, and why a tensor goes that way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayTotal:
    """Everything that lands in one way."""

    num_tensors: int
    num_copies: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTotal:
    """One engine rank's plan in numbers.

    Args:
        rank: of the engine rank.
        nbytes: needed.
        read_nbytes: read; more than ``nbytes`` where spans enclose what is not needed.
        num_reads: one-sided reads a version.
        by_trainer: bytes read from every trainer rank.
        parameter_nbytes: of the rank's own parameters.
        landing_nbytes: memory that a version is read into.
    """

    rank: int
    nbytes: int
    read_nbytes: int
    num_reads: int
    by_trainer: Mapping[int, int]
    parameter_nbytes: int
    landing_nbytes: int


@dataclass(slots=True)
class PlanSummary:
    """Totals over the plans that were added, one a rank."""

    ranks: list[RankTotal] = field(default_factory=list)
    _tensors: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _copies: Counter[str] = field(default_factory=Counter)
    _nbytes: Counter[str] = field(default_factory=Counter)

    def add(self, engine: Manifest, plan: Plan) -> None:
        """Count one engine rank's plan."""
        for copy in plan.copies:
            way = way_of(copy)
            self._tensors[way].add(copy.tensor)
            self._copies[way] += 1
            self._nbytes[way] += copy.region.num_elements * itemsize_bytes(copy.source_dtype)
        self.ranks.append(
            RankTotal(
                rank=plan.engine_rank,
                nbytes=plan.payload_nbytes,
                read_nbytes=plan.read_nbytes,
                num_reads=plan.num_reads,
                by_trainer={rank: sum(r.nbytes for r in reads) for rank, reads in plan.reads.items()},
                parameter_nbytes=sum(window.nbytes for window in engine.windows.values()),
                landing_nbytes=plan.landing_nbytes,
            )
        )

    def ways(self) -> dict[str, WayTotal]:
        """Totals by way, the largest first."""
        return {
            way: WayTotal(num_tensors=len(self._tensors[way]), num_copies=self._copies[way], nbytes=nbytes)
            for way, nbytes in self._nbytes.most_common()
        }

    def egress(self, num_trainers: int) -> list[int]:
        """Bytes read from every trainer rank, by rank."""
        total = sum_egress(rank.by_trainer for rank in self.ranks)
        return [total[rank] for rank in range(num_trainers)]


def way_of(copy: Copy) -> str:
    """Key of ``REASONS`` for one copy."""
    itemsize = itemsize_bytes(copy.source_dtype)
    ways = [] if is_contiguous(copy.region.shape, copy.landing_stride_bytes, itemsize) else ["strided"]
    if copy.source_dtype != copy.target_dtype:
        ways.append("cast")
    return " ".join(ways) or "direct"


def sum_egress(rows: Iterable[Mapping[int, int]]) -> Counter[int]:
    """Bytes by trainer rank over several readers."""
    total: Counter[int] = Counter()
    for row in rows:
        total.update(row)
    return total


def imbalance(loads: Iterable[int]) -> float:
    """The largest load over the mean, less one; 0 when nothing is carried."""
    held = list(loads)
    return max(held) * len(held) / sum(held) - 1 if any(held) else 0.0
