"""What a set of plans amounts to: bytes by rank and by method, balance, memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.plan import RELOAD_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rdt_core.manifest import Manifest
    from rdt_core.plan import Copy, Plan

MEANINGS = {
    "direct": "contiguous on the trainer: read as it lies",
    "runs": "columns of a matrix, read run by run",
    "span": "columns of a matrix, read as the span around them",
    "rows": "columns of a matrix, read as they lie",
    "packed": "columns of a matrix, packed by the trainer at publish",
    "cast": "wider than the engine's dtype, narrowed by the trainer at publish",
    "reload": "whole, as in a checkpoint; the engine's own loader takes it at commit",
}
"""How bytes land, for people: the methods of :mod:`rdt_core.read_method`, and the reload path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayTotal:
    """Everything that is read by one method.

    Args:
        num_tensors: with a part that is read so.
        num_copies: parts.
        nbytes: that land.
        example: a tensor's part, and why it is read so.
    """

    num_tensors: int
    num_copies: int
    nbytes: int
    example: str


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
        landing_nbytes: memory that a version is read into, and that reloaded tensors are put together in.
        arena_nbytes: memory that trainer ranks keep for this rank beside their parameters.
    """

    rank: int
    nbytes: int
    read_nbytes: int
    num_reads: int
    by_trainer: Mapping[int, int]
    parameter_nbytes: int
    landing_nbytes: int
    arena_nbytes: int


@dataclass(slots=True)
class PlanSummary:
    """Totals over the plans that were added, one a rank."""

    ranks: list[RankTotal] = field(default_factory=list)
    _tensors: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _copies: Counter[str] = field(default_factory=Counter)
    _nbytes: Counter[str] = field(default_factory=Counter)
    _examples: dict[str, str] = field(default_factory=dict)

    def add(self, engine: Manifest, plan: Plan) -> None:
        """Count one engine rank's plan."""
        for copy in plan.copies:
            way, reason = _way_of(copy)
            self._tensors[way].add(copy.tensor)
            self._copies[way] += 1
            self._nbytes[way] += copy.region.num_elements * itemsize_bytes(copy.source_dtype)
            self._examples.setdefault(way, f"{copy.tensor}{copy.region}: {reason}")
        reload_nbytes = sum(w.nbytes for w in engine.windows.values() if w.name.startswith(RELOAD_PREFIX))
        self.ranks.append(
            RankTotal(
                rank=plan.engine_rank,
                nbytes=plan.payload_nbytes,
                read_nbytes=plan.read_nbytes,
                num_reads=plan.num_reads,
                by_trainer={
                    rank: sum(r.nbytes for r in plan.reads_from(rank)) for rank in plan.trainer_ranks
                },
                parameter_nbytes=sum(window.nbytes for window in engine.windows.values()) - reload_nbytes,
                landing_nbytes=plan.landing_nbytes + reload_nbytes,
                arena_nbytes=plan.arena_bytes,
            )
        )

    def ways(self) -> dict[str, WayTotal]:
        """Totals by way, the largest first."""
        return {
            way: WayTotal(
                num_tensors=len(self._tensors[way]),
                num_copies=self._copies[way],
                nbytes=nbytes,
                example=self._examples[way],
            )
            for way, nbytes in self._nbytes.most_common()
        }

    def egress(self, num_trainers: int) -> list[int]:
        """Bytes read from every trainer rank, by rank."""
        total = sum_egress(rank.by_trainer for rank in self.ranks)
        return [total[rank] for rank in range(num_trainers)]


def _way_of(copy: Copy) -> tuple[str, str]:
    """By which way a copy's bytes land, and why."""
    if copy.window.startswith(RELOAD_PREFIX):
        return "reload", f"the engine's loader cannot be replayed by reads; read {copy.method}, {copy.reason}"
    return copy.method, copy.reason


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
