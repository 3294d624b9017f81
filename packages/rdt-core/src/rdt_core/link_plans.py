"""What an engine rank reads over every link, in the pieces in which it reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.fan_out import cut_reads, share_bounds
from rdt_core.links import LinkPlan
from rdt_core.pacing import piece_nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdt_core.landing import Landing
    from rdt_core.plan import DirectRead, Plan, Read
    from rdt_core.transports.base import Link


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPlans:
    """Of one engine rank.

    Args:
        by_rank: what to read from each trainer rank.
        num_shares: of the landing memory; 1 for a rank that reads alone.
        sections: by trainer rank, how many of its links each share has, in order.
        sizes: by trainer rank and share, bytes and reads.
        piece_nbytes: of the pieces between which the rank rests; None where it does not.
    """

    by_rank: Mapping[int, LinkPlan]
    num_shares: int
    sections: Mapping[int, tuple[int, ...]]
    sizes: Mapping[int, tuple[tuple[int, int], ...]]
    piece_nbytes: int | None

    def of_share(self, links: Sequence[Link], trainer_rank: int, share: int) -> Sequence[Link]:
        """Those of the links to a trainer rank that carry one share."""
        counts = self.sections[trainer_rank]
        first = sum(counts[:share])
        return links[first : first + counts[share]]


@dataclass(slots=True)
class LinkUse:
    """What was read over the links to one trainer rank in one sync.

    Args:
        started_unix_s: by this process's clock.
        seconds: reading.
        nbytes: that crossed.
        num_reads: one-sided copies.
    """

    started_unix_s: float
    seconds: float = 0.0
    nbytes: int = 0
    num_reads: int = 0

    def add(self, nbytes: int, num_reads: int, seconds: float) -> None:
        """One share more."""
        self.nbytes += nbytes
        self.num_reads += num_reads
        self.seconds += seconds


def plan_links(plan: Plan, landing: Landing, *, num_shares: int = 1, rests: bool = False) -> LinkPlans:
    """Over one link a trainer rank, or one a share that other ranks read too, or piece by piece.

    Args:
        plan: of the rank.
        landing: that it lands in.
        num_shares: of the landing memory; more than one only where nothing is read directly.
        rests: whether the rank rests between pieces.
    """
    bounds = share_bounds(plan.landing_nbytes, num_shares)
    max_nbytes = piece_nbytes(plan.read_nbytes) if rests else None
    by_rank: dict[int, LinkPlan] = {}
    sections: dict[int, tuple[int, ...]] = {}
    sizes: dict[int, tuple[tuple[int, int], ...]] = {}
    for rank in plan.trainer_ranks:
        reads = plan.reads_from(rank)
        shares = [reads] if num_shares == 1 else cut_reads(plan.reads.get(rank, ()), bounds)
        parts = [_plan_share(share, landing, max_nbytes) for share in shares]
        sections[rank] = tuple(len(part.pieces) for part in parts)
        sizes[rank] = tuple((sum(read.nbytes for read in share), len(share)) for share in shares)
        by_rank[rank] = LinkPlan(
            ranges=[found for part in parts for found in part.ranges],
            targets=[found for part in parts for found in part.targets],
            items=plan.arenas.get(rank, ()),
            pieces=[found for part in parts for found in part.pieces],
        )
    return LinkPlans(
        by_rank=by_rank, num_shares=num_shares, sections=sections, sizes=sizes, piece_nbytes=max_nbytes
    )


def _plan_share(reads: Sequence[Read | DirectRead], landing: Landing, max_nbytes: int | None) -> LinkPlan:
    whole = LinkPlan(
        ranges=[(read.window, read.source) for read in reads],
        targets=landing.targets(reads),
        pieces=[len(reads)] if reads else [],
    )
    return whole if max_nbytes is None else whole.cut(max_nbytes)
