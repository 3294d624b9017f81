"""Who reads what where engine ranks of one node need the same: a share each, and the rest from the others.

Pure. A *circle* is a list of engine ranks whose landing memory is alike byte for byte. Each reads its share
of that memory from the trainers and the other shares from its neighbours, so that bytes cross the trainers'
links once a circle and not once a rank.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from rdt_core.errors import ConfigError, WireFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rdt_core.plan import Plan, Read

AUTO, ALWAYS, NEVER = "auto", "always", "never"
POLICIES = (AUTO, ALWAYS, NEVER)

MIN_NBYTES = 2**30
"""Below this what neighbours have to say to each other takes longer than what they spare."""

MAX_CIRCLE = 8
"""Every rank of a circle has links to all others."""

_GRAIN_NBYTES = 64


class Neighbour(NamedTuple):
    """An engine rank of a circle: its engine's identity and its rank there."""

    engine: str
    rank: int


Circle = tuple[Neighbour, ...]


class Place(NamedTuple):
    """What a driver knows of an engine rank's landing memory.

    Args:
        neighbour: whose it is.
        key: equal for what is alike, see :func:`landing_key`; empty for a rank that reads alone.
        device: names the accelerator; empty where it does not matter.
    """

    neighbour: Neighbour
    key: str
    device: str


def check_policy(policy: object) -> str:
    """A policy as a user gave it.

    Raises:
        ConfigError: there is none of this name.
    """
    if policy not in POLICIES:
        raise ConfigError(f"fan_out={policy!r} is not a policy. Use one of {POLICIES}.")
    return str(policy)


def landing_key(plan: Plan, node: str) -> str:
    """Equal for engine ranks of one node that land the same bytes in the same places, and for no others."""
    digest = hashlib.sha256(f"{node}\n{plan.landing_nbytes}\n".encode())
    for reads in plan.reads.values():
        for read in reads:
            digest.update(repr(read).encode())
    for copy in plan.copies:
        landed = (copy.tensor, copy.region, copy.source_dtype, copy.landing_offset_bytes)
        digest.update(repr((*landed, copy.landing_stride_bytes)).encode())
    return digest.hexdigest()


def form_circles(places: Sequence[Place]) -> dict[Neighbour, Circle]:
    """The circle of every rank that has one.

    Ranks on one accelerator do not share: they would copy inside of it. What is left of a node is cut into
    circles of about the same size.
    """
    alike: defaultdict[str, dict[str, Neighbour]] = defaultdict(dict)
    for place in places:
        if place.key:
            # Without a device each counts for itself.
            alike[place.key].setdefault(place.device or repr(place.neighbour), place.neighbour)
    circles: dict[Neighbour, Circle] = {}
    for by_device in alike.values():
        members = list(by_device.values())
        num_circles = -(-len(members) // MAX_CIRCLE)
        for number in range(num_circles):
            circle = tuple(members[number::num_circles])
            if len(circle) > 1:
                circles |= dict.fromkeys(circle, circle)
    return circles


def share_bounds(landing_nbytes: int, num_shares: int) -> list[int]:
    """Where every share of a landing memory begins, and behind them its end, in bytes."""
    inner = [
        landing_nbytes * number // num_shares // _GRAIN_NBYTES * _GRAIN_NBYTES for number in range(num_shares)
    ]
    return [*inner, landing_nbytes]


def cut_reads(reads: Sequence[Read], bounds: Sequence[int]) -> list[list[Read]]:
    """The same reads, cut where shares of the landing memory meet; those of every share, in their order."""
    shares: list[list[Read]] = [[] for _ in bounds[1:]]
    for read in reads:
        start, end = read.landing_offset_bytes, read.landing_offset_bytes + read.nbytes
        for share in range(bisect_right(bounds, start) - 1, len(shares)):
            first, last = max(start, bounds[share]), min(end, bounds[share + 1])
            if bounds[share] >= end:
                break
            if first < last:
                shares[share] += _cut_read(read, first - start, last - start)
    return shares


def _cut_read(read: Read, first: int, last: int) -> Iterator[Read]:
    """Bytes number ``first`` up to ``last`` of a read."""
    at = read.landing_offset_bytes + first
    for part in read.source.cut(first, last):
        yield replace(
            read,
            offset_bytes=part.offset,
            nbytes=part.nbytes,
            landing_offset_bytes=at,
            num_rows=part.num_rows,
            pitch_bytes=part.pitch,
        )
        at += part.nbytes


def circles_to_wire(circles: Mapping[Neighbour, Circle], engine: str) -> dict[str, list[list[object]]]:
    """What a driver tells one engine: by rank, the circles of those that have one."""
    return {
        str(neighbour.rank): [list(other) for other in circle]
        for neighbour, circle in circles.items()
        if neighbour.engine == engine
    }


def circle_from_wire(value: object, engine: str, rank: int) -> Circle:
    """The circle of one rank; empty when it has none.

    Raises:
        WireFormatError: it is no circle that this rank is in.
    """
    what = "prepare request"
    if not isinstance(value, dict):
        raise WireFormatError(what, "circles must be an object, by rank")
    listed = value.get(str(rank), [])
    if not isinstance(listed, list) or len(listed) > MAX_CIRCLE:
        raise WireFormatError(what, f"a circle is a list of {MAX_CIRCLE} ranks at most")
    circle = tuple(_neighbour(entry) for entry in listed)
    if circle and (circle.count(Neighbour(engine, rank)) != 1 or len(set(circle)) != len(circle)):
        raise WireFormatError(what, f"rank {rank} of {engine} must be in its circle once, and others too")
    return circle


def _neighbour(entry: object) -> Neighbour:
    match entry:
        case [str(engine), int(rank)] if not isinstance(rank, bool):
            return Neighbour(engine, rank)
    raise WireFormatError("prepare request", "a neighbour is an engine's name and a rank")
