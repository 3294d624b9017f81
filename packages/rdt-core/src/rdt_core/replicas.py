"""Picks, for everything that several trainer ranks hold alike, the one that an engine rank reads it from.

Nearest first: where a rank of the engine's own node holds it, only those count. Then evenly: no rank is read
much more than an even spread would have it. Within that, as few ranks as possible: every rank that is read
from costs a link, with a probe at connect and a request a version, so that what is small goes where something
is read anyway.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from rdt_core.sources import Holder

_SLACK = 0.05
"""How far above an even spread a rank may be read, to spare the engine rank a link."""

_Memory = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """A region that one engine shard needs, and who holds it.

    Args:
        holders: of it, by rank; any of them will do.
        nbytes: of the region in a holder's memory.
    """

    holders: Sequence[Holder]
    nbytes: int


@dataclass(slots=True)
class _Group:
    """Options that are one memory on every rank: what they share crosses a link once when one is read."""

    ranks: tuple[int, ...]
    members: list[int]
    nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """The engine rank that reads.

    Args:
        node: that it is on.
        rank: in its engine.
        world_size: ranks of its engine.
    """

    node: str
    rank: int
    world_size: int


def choose_replicas(options: Sequence[Option], nodes: Mapping[int, str], reader: Reader) -> list[Holder]:
    """One holder for every option, in order. Deterministic; engine ranks break ties differently.

    Args:
        options: of one engine rank.
        nodes: of all trainer ranks.
        reader: the engine rank.
    """
    near = {rank for rank, node in nodes.items() if node == reader.node}
    groups = _group(options, near)
    spread = _Spread(groups, reader)
    chosen: list[Holder | None] = [None] * len(options)
    # What has no choice first, then the largest: what is small evens out what is left.
    for group in sorted(groups, key=lambda group: (len(group.ranks) > 1, -group.nbytes, group.members[0])):
        rank = spread.take(group)
        for index in group.members:
            chosen[index] = next(h for h in options[index].holders if h.trainer_rank == rank)
    return [holder for holder in chosen if holder is not None]


def _group(options: Sequence[Option], near: Collection[int]) -> list[_Group]:
    groups: dict[_Memory, _Group] = {}
    for index, option in enumerate(options):
        first = option.holders[0]
        held_by = tuple(holder.trainer_rank for holder in option.holders)
        memory = (first.shard.window, first.shard.offset_bytes, held_by)
        group = groups.get(memory)
        if group is None:
            ranks = tuple(rank for rank in held_by if rank in near) or held_by
            group = groups[memory] = _Group(ranks, [])
        group.members.append(index)
        group.nbytes += option.nbytes
    return list(groups.values())


class _Spread:
    """Bytes given to every trainer rank so far, and how many it may be given to spare a link."""

    def __init__(self, groups: Sequence[_Group], reader: Reader) -> None:
        self._reader = reader
        self._given: dict[int, int] = {}
        fixed: Counter[int] = Counter()
        for group in groups:
            if len(group.ranks) == 1:
                fixed[group.ranks[0]] += group.nbytes
        free = [group for group in groups if len(group.ranks) > 1]
        levels = [fixed[rank] for rank in {rank for group in free for rank in group.ranks}]
        self._most = (1 + _SLACK) * max(_even_level(levels, [group.nbytes for group in free]), *levels, 0)

    def take(self, group: _Group) -> int:
        """The rank that a group is read from."""
        start = self._start(group.ranks)
        turned = (*group.ranks[start:], *group.ranks[:start])
        linked = [
            rank for rank in turned if rank in self._given and self._given[rank] + group.nbytes <= self._most
        ]
        rank = min(linked or turned, key=lambda rank: self._given.get(rank, 0))
        self._given[rank] = self._given.get(rank, 0) + group.nbytes
        return rank

    def _start(self, ranks: Sequence[int]) -> int:
        """Where this engine rank begins among equals, so that engine ranks that need the same begin apart.

        If it reads from some of these already, the largest is its own as others have theirs: right behind
        that. If it reads from none, or from all as every rank of a tensor-parallel engine does, engine ranks
        that need the same are neighbours, or a stride of 2, 4, 8 apart. The sum of a rank's digits in base
        ``len(ranks)`` sends either kind to different places, which the rank itself does not; it stands for
        its own, so that both kinds of engine ranks agree. Engines begin apart by their node, but where the
        ranks of one engine come out even already.
        """
        count = len(ranks)
        if count == 1:
            return 0
        linked = [index for index in range(count) if ranks[index] in self._given]
        if 0 < len(linked) < count:
            own = max(linked, key=lambda index: self._given[ranks[index]])
        else:
            own = _sum_digits(self._reader.rank, base=count)
            if self._reader.world_size % count:
                own += zlib.crc32(self._reader.node.encode("utf-8", "replace"))
        return (own + 1) % count


def _sum_digits(number: int, *, base: int) -> int:
    total = 0
    while number:
        number, digit = divmod(number, base)
        total += digit
    return total


def _even_level(levels: Sequence[int], sizes: Sequence[int]) -> float:
    """How high pieces of these sizes come over ``levels`` when those that stick out stand alone."""
    heap, left = list(levels), sum(sizes)
    heapq.heapify(heap)
    for size in sorted(sizes, reverse=True):
        if heap[0] + size <= _fill_evenly(heap, left):
            break
        heapq.heapreplace(heap, heap[0] + size)
        left -= size
    return _fill_evenly(heap, left) if left else 0.0


def _fill_evenly(levels: Sequence[int], nbytes: int) -> float:
    """How high ``nbytes`` come when they are poured over ``levels``."""
    filled, rising = 0, sorted(levels)
    for count, level in enumerate(rising, start=1):
        filled += level
        height = (filled + nbytes) / count
        if count == len(rising) or height <= rising[count]:
            return height
    return 0.0
