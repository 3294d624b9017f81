"""What a reader asks a trainer rank to offer, checked at the border: it comes from another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdt_core.arena import ARENA_WINDOW, items_from_wire, place_items
from rdt_core.errors import WireFormatError
from rdt_core.row_blocks import Rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.arena import ArenaItem

_WHAT = "export request"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """Byte ranges for one reader.

    Args:
        reader: its name.
        transport: that is to carry them.
        ranges: (window, rows), each inside of its window.
        items: what the arena holds that some of them lie in.
        pieces: how many of the ranges each export offers, in order; none for all in one.
    """

    reader: str
    transport: str
    ranges: tuple[tuple[str, Rows], ...]
    items: tuple[ArenaItem, ...]
    pieces: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """One round of a probe; see :class:`rdt_core.probe.ProbeSource`."""

    reader: str
    transport: str
    secret: str
    version: int


def parse_export(payload: Mapping[str, Any], window_nbytes: Mapping[str, int]) -> ExportRequest:
    """A checked request for byte ranges.

    Args:
        payload: as it came.
        window_nbytes: size of every window of this rank.

    Raises:
        WireFormatError: a field is missing, of the wrong type, a range reaches out of its window, or the
            pieces are not made of all ranges.
        UnknownDtypeError: an item of the arena has a dtype that this project does not move.
    """
    items = items_from_wire(_sequence(payload, "arena"))
    sizes = {**window_nbytes, ARENA_WINDOW: place_items(items)[1]}
    ranges = tuple(_parse_range(part, sizes) for part in _sequence(payload, "ranges"))
    pieces = tuple(_whole(count, "a piece") for count in _sequence(payload, "pieces"))
    if pieces and (0 in pieces or sum(pieces) != len(ranges)):
        raise WireFormatError(_WHAT, f"pieces of {sum(pieces)} ranges, none of them empty, for {len(ranges)}")
    return ExportRequest(
        reader=parse_reader(payload),
        transport=_text(payload, "transport"),
        ranges=ranges,
        items=items,
        pieces=pieces,
    )


def parse_probe(payload: Mapping[str, Any]) -> ProbeRequest:
    """A checked round of a probe.

    Raises:
        WireFormatError: a field is missing or of the wrong type.
    """
    return ProbeRequest(
        reader=parse_reader(payload),
        transport=_text(payload, "transport"),
        secret=_text(payload, "secret"),
        version=_whole(payload.get("version"), "version"),
    )


def parse_reader(payload: Mapping[str, Any]) -> str:
    """The name of the reader that a request is about.

    Raises:
        WireFormatError: there is none.
    """
    return _text(payload, "reader")


def range_to_wire(window: str, rows: Rows) -> tuple[str | int, ...]:
    """What :func:`parse_export` takes for one of its ranges."""
    return (window, *rows) if rows.num_rows > 1 else (window, rows.offset, rows.row_nbytes)


def _parse_range(part: object, sizes: Mapping[str, int]) -> tuple[str, Rows]:
    if not isinstance(part, (list, tuple)) or len(part) not in (3, 5) or not isinstance(part[0], str):
        raise WireFormatError(
            _WHAT, "a range must be a window's name, an offset, a size, and for rows their number and pitch"
        )
    window, numbers = part[0], part[1:]
    rows = Rows(*map(_whole, numbers, ("offset", "size", "number of rows", "pitch")))
    if rows.num_rows < 1 or (rows.num_rows > 1 and not 0 < rows.row_nbytes <= rows.pitch):
        raise WireFormatError(
            _WHAT, f"{rows.num_rows} rows of {rows.row_nbytes} bytes, {rows.pitch} bytes apart"
        )
    if rows.end > sizes.get(window, -1):
        held = f"{sizes[window]} bytes" if window in sizes else "no such window"
        raise WireFormatError(_WHAT, f"bytes {rows.offset} to {rows.end} of {window[:100]!r}: {held} here")
    return window, rows


def _text(payload: Mapping[str, Any], field: str) -> str:
    value = payload.get(field)
    if not isinstance(value, str):
        raise WireFormatError(_WHAT, f"{field} must be text")
    return value


def _whole(value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise WireFormatError(_WHAT, f"{field} must be a whole number, 0 or more")
    return value


def _sequence(payload: Mapping[str, Any], field: str) -> list[Any] | tuple[Any, ...]:
    value = payload.get(field)
    if not isinstance(value, (list, tuple)):
        raise WireFormatError(_WHAT, f"{field} must be a list")
    return value
