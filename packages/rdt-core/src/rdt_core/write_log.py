"""What a loader wrote into an engine's memory, in order, and what remains of it in the end.

Of two writes to one element the later holds. :class:`WriteLog` keeps the order while the loader runs;
:func:`settle` then drops or trims what was overwritten, so that the writes left are disjoint and may be
replayed in any order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from rdt_core.describe import span_bytes
from rdt_core.errors import UnsupportedLoaderError
from rdt_core.provenance import Origin, names_of
from rdt_core.strided import is_gapless

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rdt_core.strided import Pairing


class Write(NamedTuple):
    """One write into a window. ``pairing`` leads from the origin's elements to the window's bytes.

    Args:
        tensor: what the loader was working on, for error messages.
    """

    window: str
    dtype: torch.dtype
    origin: Origin
    pairing: Pairing
    tensor: str

    @property
    def start(self) -> int:
        """First byte written."""
        return self.pairing.target

    @property
    def stop(self) -> int:
        """Behind the last byte written."""
        steps = sum((axis.length - 1) * axis.target_step for axis in self.pairing.axes)
        return self.pairing.target + steps + self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether the write leaves no gap between its first and its last byte."""
        axes = self.pairing.axes
        return is_gapless((a.length for a in axes), (a.target_step for a in axes), self.dtype.itemsize)


class Remnant(NamedTuple):
    """A write and those of its pairs (source element, target byte) that still hold; None when all do."""

    write: Write
    left: tuple[torch.Tensor, torch.Tensor] | None


class Span(NamedTuple):
    """Bytes ``[start, stop)`` of a window, of which ``mask`` (one a unit, None for all) were written."""

    start: int
    stop: int
    mask: torch.Tensor | None


class WriteLog:
    """Writes by window, in the order in which the loader made them."""

    def __init__(self) -> None:
        self.by_window: dict[str, list[Write]] = {}

    def __iter__(self) -> Iterator[Write]:
        return (write for writes in self.by_window.values() for write in writes)

    def add(self, write: Write) -> None:
        """Append a write; one of no element is dropped."""
        if write.pairing.num_pairs:
            self.by_window.setdefault(write.window, []).append(write)

    def touching(self, window: str, start: int, stop: int) -> list[Write]:
        """Writes so far whose byte span meets ``[start, stop)``."""
        return [w for w in self.by_window.get(window, ()) if w.start < stop and start < w.stop]

    def touching_view(self, window: str, tensor: torch.Tensor) -> list[Write]:
        """Writes so far whose byte span meets that of a view of the window."""
        return self.touching(window, *span_bytes(tensor)) if tensor.numel() else []

    def names_touching(self, window: str, start: int, stop: int) -> frozenset[str]:
        """Checkpoint tensors that the bytes ``[start, stop)`` may hold values of."""
        return frozenset().union(*(names_of(write.origin) for write in self.touching(window, start, stop)))


class Settled(NamedTuple):
    """What the writes of one window come to: remnants in order, and the bytes they cover."""

    remnants: list[Remnant]
    spans: list[Span]
    unit: int


def settle(writes: Sequence[Write], unit: int) -> Settled:
    """Find what remains of the writes of one window.

    Args:
        writes: of one window, in order.
        unit: size in bytes that divides every offset and step, the smallest element size in use.

    Raises:
        UnsupportedLoaderError: writes of different element types overlap by halves.
    """
    remnants: list[Remnant] = []
    spans: list[Span] = []
    for group in _meeting(writes):
        kept, span = _settle_group(group, unit)
        remnants += kept
        spans.append(span)
    return Settled(remnants, spans, unit)


def _meeting(writes: Sequence[Write]) -> Iterator[list[Write]]:
    """Groups of writes whose spans meet, each in the order of writing."""
    order = sorted(range(len(writes)), key=lambda index: writes[index].start)
    group: list[int] = []
    stop = 0
    for index in order:
        if group and writes[index].start >= stop:
            yield [writes[i] for i in sorted(group)]
            group = []
        group.append(index)
        stop = max(stop, writes[index].stop) if len(group) > 1 else writes[index].stop
    if group:
        yield [writes[i] for i in sorted(group)]


def _settle_group(group: Sequence[Write], unit: int) -> tuple[list[Remnant], Span]:
    start, stop = min(write.start for write in group), max(write.stop for write in group)
    if len(group) == 1 and group[0].is_dense:
        return [Remnant(group[0], None)], Span(start, stop, None)
    # The smallest integers that can number the writes: this is one number a unit of a whole parameter.
    number_type = next(t for t in (torch.int8, torch.int16, torch.int32) if len(group) < torch.iinfo(t).max)
    owner = torch.full(((stop - start) // unit,), -1, dtype=number_type)
    for number, write in enumerate(group):
        _elements(owner, write.pairing, write.dtype, start, unit).fill_(number)
    remnants = [
        remnant
        for number, write in enumerate(group)
        if (remnant := _remains(owner, number, write, start, unit)) is not None
    ]
    written = owner >= 0
    return remnants, Span(start, stop, None if bool(written.all()) else written)


def _elements(
    flat: torch.Tensor, pairing: Pairing, dtype: torch.dtype, start: int, unit: int
) -> torch.Tensor:
    """The units of a flat array that a write touches: one dim a loop, the last for units of an element."""
    counts = [axis.length for axis in pairing.axes]
    steps = [axis.target_step // unit for axis in pairing.axes]
    return flat.as_strided((*counts, dtype.itemsize // unit), (*steps, 1), (pairing.target - start) // unit)


def _remains(owner: torch.Tensor, number: int, write: Write, start: int, unit: int) -> Remnant | None:
    """What of a write still holds; None when nothing does."""
    units_held = _elements(owner, write.pairing, write.dtype, start, unit) == number
    held = units_held.all(dim=-1)
    if bool(held.all()):
        return Remnant(write, None)
    if not torch.equal(held, units_held.any(dim=-1)):
        raise UnsupportedLoaderError(write.tensor, "a write over parts of elements")
    if not bool(held.any()):
        return None
    at = held.nonzero()
    steps = torch.tensor([axis[1:] for axis in write.pairing.axes], dtype=torch.int64).reshape(-1, 2)
    sources, targets = (at[:, :, None] * steps).sum(dim=1).unbind(dim=1)
    return Remnant(write, (write.pairing.source + sources, write.pairing.target + targets))


def is_covered(settled: Settled, tensor: torch.Tensor) -> bool:
    """Whether every element of a view of the window was written."""
    if tensor.numel() == 0:
        return True
    start, stop = span_bytes(tensor)
    near = [span for span in settled.spans if span.start < stop and start < span.stop]
    at = start
    for span in near:  # ascending and disjoint
        if span.mask is None and span.start <= at:
            at = span.stop
    return at >= stop or _is_covered_by_units(near, settled.unit, tensor, start, stop)


def _is_covered_by_units(
    spans: Sequence[Span], unit: int, tensor: torch.Tensor, start: int, stop: int
) -> bool:
    written = torch.zeros((stop - start) // unit, dtype=torch.bool)
    for span in spans:
        low, high = max(span.start, start), min(span.stop, stop)
        part = written[(low - start) // unit : (high - start) // unit]
        if span.mask is None:
            part.fill_(1)
        else:
            part.copy_(span.mask[(low - span.start) // unit : (high - span.start) // unit])
    per_element = tensor.element_size() // unit
    shape, steps = (*tensor.shape, per_element), (*(s * per_element for s in tensor.stride()), 1)
    return bool(written.as_strided(shape, steps, 0).all())


def unit_of(writes: Sequence[Write], holders: Sequence[torch.Tensor]) -> int:
    """Smallest element size among the writes of a window and the tensors that hold it, in bytes."""
    sizes = [write.dtype.itemsize for write in writes] + [tensor.element_size() for tensor in holders]
    return min(sizes, default=1)
