"""Who reads what from whom at one version, over all engines: every engine rank's reads, with replicas chosen.

With fan-out, what several ranks of a node need crosses that node's NICs once, to one of them, and the others
copy it inside the node. Choices go to the least loaded, what can only go one way first, so that replicas even
out what the layout leaves uneven.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdt_core.plan_summary import sum_egress
from rdt_core.simulator.classes import find_classes, find_needs
from rdt_core.simulator.cuts import land

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from rdt_core.models.parameter import Layout
    from rdt_core.simulator.classes import Need
    from rdt_core.simulator.cuts import LandedPiece
    from rdt_core.simulator.topology import Topology

_MAX_HANDOUTS = 1024
"""A class of many tensors is handed out in at most this many portions."""


@dataclass(slots=True)
class Traffic:
    """Bytes of one version by where they go. Engine ranks count over all engines.

    Args:
        num_trainers, num_engine_ranks: of all.
        needed: bytes that each engine rank needs, as they lie in its parameters.
        landed: bytes that each engine rank receives.
        nic_in, nic_out: bytes that cross between nodes, by engine rank and by trainer rank.
        local_in: bytes that reach an engine rank from trainer ranks of its own node.
        fan_in, fan_out: bytes copied between engine ranks of one node, by receiver and by giver.
        num_reads: one-sided reads of each engine rank, before neighbours are united: an upper bound.
        arena: bytes that each trainer rank copies at publish, read plus written.
        pairs: bytes by engine rank and trainer rank.
        node_distinct: by engine node, bytes that its ranks need, what they share counted once.
    """

    num_trainers: int
    num_engine_ranks: int
    needed: Counter[int] = field(default_factory=Counter)
    landed: Counter[int] = field(default_factory=Counter)
    nic_in: Counter[int] = field(default_factory=Counter)
    nic_out: Counter[int] = field(default_factory=Counter)
    local_in: Counter[int] = field(default_factory=Counter)
    fan_in: Counter[int] = field(default_factory=Counter)
    fan_out: Counter[int] = field(default_factory=Counter)
    num_reads: Counter[int] = field(default_factory=Counter)
    arena: Counter[int] = field(default_factory=Counter)
    pairs: defaultdict[int, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    node_distinct: Counter[int] = field(default_factory=Counter)

    def egress(self) -> list[int]:
        """Bytes read from every trainer rank, by rank."""
        total = sum_egress(self.pairs.values())
        return [total[rank] for rank in range(self.num_trainers)]

    def node_in(self, topology: Topology) -> Mapping[int, int]:
        """Bytes that cross every engine node's NICs."""
        total: Counter[int] = Counter()
        for rank, nbytes in self.nic_in.items():
            total[topology.engine_node(rank, self.num_trainers)] += nbytes
        return total


@dataclass(frozen=True, slots=True)
class _Demand:
    """A need of ranks of one node: any of ``readers`` may read each tensor, from any of ``holders``."""

    need: Need
    piece: LandedPiece
    readers: tuple[int, ...]
    holders: tuple[int, ...]

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.readers) == len(self.holders) == 1


def plan_traffic(
    trainer: Layout, engine: Layout, num_engines: int, topology: Topology, *, has_fan_out: bool
) -> Traffic:
    """Plan every rank of every engine. Deterministic; linear in what the ranks of one engine describe.

    Raises:
        PlanError: the two layouts do not fit together.
    """
    planner = _TrafficPlanner(Traffic(trainer.world_size, engine.world_size * num_engines), topology)
    starts = range(0, num_engines * engine.world_size, engine.world_size)
    demands = [
        demand
        for found in find_classes(trainer, engine)
        for need in find_needs(found)
        for demand in planner.demand(need, starts, has_fan_out=has_fan_out)
    ]
    demands.sort(key=lambda demand: (not demand.is_fixed, -demand.piece.read_nbytes))
    for demand in demands:
        planner.assign(demand)
    return planner.finish()


class _TrafficPlanner:
    """Adds demand after demand to one traffic."""

    def __init__(self, traffic: Traffic, topology: Topology) -> None:
        self._traffic, self._topology = traffic, topology
        self._laid_out: dict[tuple[int, int], tuple[int, int]] = {}

    def demand(self, need: Need, starts: Iterable[int], *, has_fan_out: bool) -> Iterator[_Demand]:
        """What all engines' ranks demand of a need: once a node with fan-out, once a rank without.

        Args:
            need: of one engine's ranks.
            starts: the first rank of every engine, counted over all engines.
            has_fan_out: whether ranks of one node share what they read, those of several engines too.
        """
        traffic, per_node = self._traffic, self._topology.gpus_per_node
        piece = land(need)
        by_node: defaultdict[int, list[int]] = defaultdict(list)
        for rank in (start + needer for start in starts for needer in need.needers):
            by_node[self._topology.engine_node(rank, traffic.num_trainers)].append(rank)
        for node, ranks in by_node.items():
            traffic.node_distinct[node] += piece.read_nbytes * need.num_tensors
            for rank in ranks:
                traffic.needed[rank] += piece.target_nbytes * need.num_tensors
                traffic.landed[rank] += piece.read_nbytes * need.num_tensors
            near = tuple(holder for holder in need.holders if holder // per_node == node)
            groups = [tuple(ranks)] if has_fan_out and not near else [(rank,) for rank in ranks]
            for group in groups:
                yield _Demand(need, piece, group, near or need.holders)

    def assign(self, demand: _Demand) -> None:
        """Give every tensor of a demand a reader and a holder, the least loaded each time."""
        left = demand.need.num_tensors
        portion = left if demand.is_fixed else -(-left // _MAX_HANDOUTS)
        readers = [(self._traffic.nic_in[rank], rank) for rank in demand.readers]
        holders = [(self._traffic.nic_out[rank], rank) for rank in demand.holders]
        heapq.heapify(readers)
        heapq.heapify(holders)
        given_tensors: Counter[int] = Counter()
        while left:
            count = min(portion, left)
            left -= count
            (read, reader), (given, holder) = readers[0], holders[0]
            self._carry(demand, reader, holder, count)
            given_tensors[holder] += count
            nbytes = demand.piece.read_nbytes * count
            heapq.heapreplace(readers, (read + nbytes, reader))
            heapq.heapreplace(holders, (given + nbytes, holder))
        if demand.piece.arena_nbytes:
            self._lay_out(demand, given_tensors)

    def finish(self) -> Traffic:
        """The traffic, with what was laid out in arenas."""
        for (_, holder), (count, nbytes) in self._laid_out.items():
            self._traffic.arena[holder] += count * nbytes
        return self._traffic

    def _carry(self, demand: _Demand, reader: int, holder: int, count: int) -> None:
        traffic, topology = self._traffic, self._topology
        nbytes = demand.piece.read_nbytes * count
        traffic.pairs[reader][holder] += nbytes
        traffic.num_reads[reader] += demand.piece.num_reads * count
        if holder // topology.gpus_per_node == topology.engine_node(reader, traffic.num_trainers):
            traffic.local_in[reader] += nbytes
        else:
            traffic.nic_in[reader] += nbytes
            traffic.nic_out[holder] += nbytes
        for rank in demand.readers:
            if rank != reader:
                traffic.fan_in[rank] += nbytes
                traffic.fan_out[reader] += nbytes

    def _lay_out(self, demand: _Demand, given_tensors: Counter[int]) -> None:
        """Readers that need the same box of a rank share one item of its arena."""
        for holder, count in given_tensors.items():
            key = (id(demand.need), holder)
            before, _ = self._laid_out.get(key, (0, 0))
            self._laid_out[key] = (max(before, count), demand.piece.arena_nbytes)
