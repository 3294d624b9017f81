"""Opening an engine rank's links: a transport is chosen for each trainer rank, probed, and then aimed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdt_core import settings
from rdt_core.arena import items_to_wire
from rdt_core.choice import AUTO, Endpoint, TransportChoice, choose_transport
from rdt_core.coordinator import reader_name
from rdt_core.describe import node_name
from rdt_core.export_request import range_to_wire
from rdt_core.probe import ROUNDS, ProbeTarget
from rdt_core.row_views import cut_view
from rdt_core.transports import make_transport
from rdt_core.transports.offers import offered_transports
from rdt_core.transports.pieces import cut_into_objects, split

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

    from rdt_core.arena import ArenaItem
    from rdt_core.client import CoordinatorClient
    from rdt_core.manifest import Manifest
    from rdt_core.probe import ScratchPool
    from rdt_core.row_blocks import Rows
    from rdt_core.transports.base import Link, Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """The engine rank whose links are opened.

    Args:
        engine: the engine's identity in the group.
        rank: of the worker in its engine.
        device: of its landing memory.
        forced: a transport's name, or ``AUTO``.
        timeout_s: for each wait, in seconds.
    """

    engine: str
    rank: int
    device: torch.device
    forced: str
    timeout_s: float

    @property
    def name(self) -> str:
        """Under which trainer ranks keep this reader's exports."""
        return reader_name(self.engine, self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPlan:
    """What to read from one trainer rank.

    Args:
        ranges: (window, rows) in the trainer rank's memory, one a read.
        targets: where they land, in the same order, as :func:`rdt_core.row_views.view_rows` makes them.
        items: what the trainer rank lays out, for ranges in ``rdt_core.arena.ARENA_WINDOW``.
        pieces: how many of the ranges each link carries, in order; by default one carries all.
    """

    ranges: Sequence[tuple[str, Rows]]
    targets: Sequence[torch.Tensor]
    items: Sequence[ArenaItem] = ()
    pieces: Sequence[int] = ()

    def cut(self, max_nbytes: int) -> LinkPlan:
        """The same bytes in pieces of a bounded size, each for a link of its own."""
        ranges: list[tuple[str, Rows]] = []
        targets: list[torch.Tensor] = []
        pieces = []
        for parts in cut_into_objects([rows.nbytes for _, rows in self.ranges], max_nbytes):
            num_before = len(ranges)
            for part in parts:
                window, rows = self.ranges[part.view]
                first, last = part.view_offset, part.view_offset + part.nbytes
                ranges += [(window, found) for found in rows.cut(first, last)]
                targets += cut_view(self.targets[part.view], first, last)
            pieces.append(len(ranges) - num_before)
        return LinkPlan(ranges=ranges, targets=targets, items=self.items, pieces=pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLinks:
    """All links of an engine rank, by trainer rank.

    Args:
        by_rank: the links, to pull in this order; one, or one a piece.
        choices: which transport each uses, and why.
        probe_s: what probing all of them took.
    """

    by_rank: dict[int, tuple[Link, ...]]
    choices: Mapping[int, TransportChoice]
    probe_s: float

    def __len__(self) -> int:
        return len(self.by_rank)

    def close(self) -> None:
        """Close every link and forget it, which lets go of the memory it was aimed at. Idempotent."""
        for link in itertools.chain(*self.by_rank.values()):
            link.close()
        self.by_rank.clear()

    def describe(self) -> dict[str, Any]:
        """Plain values for the connect's answer and ``status``: trainers, reasons, num_pieces, probe_s."""
        return {
            "num_pieces": sum(map(len, self.by_rank.values())),
            "trainers": {rank: choice.transport for rank, choice in self.choices.items()},
            "reasons": {rank: choice.reason for rank, choice in self.choices.items()},
            "probe_s": self.probe_s,
        }


def open_links(
    reader: Reader,
    client: CoordinatorClient,
    trainers: Sequence[Manifest],
    planned: Mapping[int, LinkPlan],
    scratch: ScratchPool,
) -> OpenLinks:
    """Open a probed link to each trainer rank of a plan. Called in the engine worker, by its connect.

    Blocks for two rounds of a few kilobytes a link, and for the registration of all memory. Leaves nothing
    open when it fails.

    Args:
        reader: this rank.
        client: of the group.
        trainers: manifests of all trainer ranks.
        planned: what to read, by trainer rank.
        scratch: to probe into.

    Raises:
        TransportUnavailableError: no transport fits a link, or the forced one is not offered.
        TransportLiesError: a transport brought other bytes than the trainer's.
        TransportError, MissingTrainerRankError: a link cannot be opened.
    """
    choices = _choose_all(reader, {manifest.rank: manifest for manifest in trainers}, planned)
    transports = {name: make_transport(name) for name in {choice.transport for choice in choices.values()}}
    by_rank = {rank: transports[choice.transport] for rank, choice in choices.items()}
    started = time.perf_counter()
    _probe_all(reader, client, by_rank, scratch)
    probe_s = time.perf_counter() - started
    with contextlib.ExitStack() as opened:
        links = _open_all(reader, client, by_rank, planned, opened)
        opened.pop_all()
    return OpenLinks(by_rank=links, choices=choices, probe_s=probe_s)


def reading_order(reader: Reader, trainer_ranks: Collection[int]) -> list[int]:
    """Which trainer ranks an engine rank reads one after the other.

    Ranks of one engine begin one apart, and engines somewhere: if all began with the first, its link would be
    shared by all and those of the others stand.
    """
    ranks = sorted(trainer_ranks)
    if not ranks:
        return []
    start = (zlib.crc32(reader.engine.encode("utf-8", "replace")) + reader.rank) % len(ranks)
    return [*ranks[start:], *ranks[:start]]


def choose_links(reader: Reader, trainers: Sequence[Manifest]) -> dict[int, TransportChoice]:
    """Which transport a link to each of these trainer ranks would use. Opens nothing.

    Raises:
        TransportUnavailableError: no transport fits a link, or the forced one is not offered.
    """
    forced = reader.forced if reader.forced != AUTO else settings.read_transport()
    device = str(reader.device)
    engine = Endpoint(f"engine rank {reader.rank}", node_name(), device, offered_transports(device))
    return {
        side.rank: choose_transport(
            Endpoint(f"trainer rank {side.rank}", side.node, side.device, side.transports), engine, forced
        )
        for side in trainers
    }


def _choose_all(
    reader: Reader, trainers: Mapping[int, Manifest], planned: Mapping[int, LinkPlan]
) -> dict[int, TransportChoice]:
    choices = choose_links(reader, [trainers[rank] for rank in sorted(planned)])
    for rank in choices:
        if choices[rank].is_second_best:
            logger.warning(
                "engine rank %d reads trainer rank %d over %s: %s",
                reader.rank,
                rank,
                choices[rank].transport,
                choices[rank].reason,
            )
    return choices


def _probe_all(
    reader: Reader, client: CoordinatorClient, transports: Mapping[int, Transport], scratch: ScratchPool
) -> None:
    """Both rounds over every link. The trainer ranks drop their probes when they get real ranges."""
    with contextlib.ExitStack() as opened:
        targets: dict[int, ProbeTarget] = {}
        for version in ROUNDS:
            secret = secrets.token_hex(16)
            tickets = _ask_probe(reader, client, transports, secret, version)
            for rank, ticket in sorted(tickets.items()):
                if rank not in targets:
                    buffer = opened.enter_context(scratch.lend(transports[rank], reader.device))
                    targets[rank] = ProbeTarget(
                        transports[rank], buffer, ticket, trainer_rank=rank, timeout_s=reader.timeout_s
                    )
                    opened.callback(targets[rank].close)
                targets[rank].check(secret, version)


def _ask_probe(
    reader: Reader, client: CoordinatorClient, transports: Mapping[int, Transport], secret: str, version: int
) -> dict[int, Any]:
    asked = {
        rank: {"reader": reader.name, "transport": transport.name, "secret": secret, "version": version}
        for rank, transport in transports.items()
    }
    return client.ask("probe", asked, reader.timeout_s)


def _open_all(
    reader: Reader,
    client: CoordinatorClient,
    transports: Mapping[int, Transport],
    planned: Mapping[int, LinkPlan],
    opened: contextlib.ExitStack,
) -> dict[int, tuple[Link, ...]]:
    """The links to every trainer rank; ``opened`` closes them if a later one fails."""
    asked = {
        rank: {
            "reader": reader.name,
            "transport": transport.name,
            "ranges": [range_to_wire(window, rows) for window, rows in planned[rank].ranges],
            "arena": items_to_wire(planned[rank].items),
            "pieces": list(planned[rank].pieces),
        }
        for rank, transport in transports.items()
    }
    tickets = client.ask("export", asked, reader.timeout_s)
    links: dict[int, tuple[Link, ...]] = {}
    for rank, offered in sorted(tickets.items()):
        targets = split(planned[rank].targets, planned[rank].pieces)
        for ticket, part in zip(offered, targets, strict=True):
            link = transports[rank].open(ticket, part, trainer_rank=rank)
            opened.callback(link.close)
            links[rank] = (*links.get(rank, ()), link)
    return {rank: links[rank] for rank in reading_order(reader, links)}
