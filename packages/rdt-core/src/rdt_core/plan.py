"""Which bytes of which trainer rank one engine rank reads, and where they go.

A plan has two parts that are carried out one after the other: *reads* bring bytes of trainer
windows into one landing buffer (``prepare``), *copies* move elements from there into the engine's
windows (``commit``). Both are fixed when trainer and engine meet and replayed at every version.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdt_core.arena import place_items
from rdt_core.row_blocks import Rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.arena import ArenaItem
    from rdt_core.region import Region


RELOAD_PREFIX = "reload:"
"""Before a tensor's name: the window that it lands in whole, for the engine's own loader to take at commit.

No parameter's name can begin so.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRead:
    """One one-sided copy of rows of bytes of a trainer's window.

    Most are of one row, a contiguous range; more are read only over links that take them (see
    :class:`rdt_core.read_method.LinkPrice`). ``nbytes`` are those of all rows. ``window`` may be
    ``rdt_core.arena.ARENA_WINDOW``: then the offset counts in the arena that the trainer rank lays out for
    this plan.
    """

    trainer_rank: int
    window: str
    offset_bytes: int
    nbytes: int
    num_rows: int = 1
    pitch_bytes: int = 0

    @property
    def source(self) -> Rows:
        """Where the bytes lie in the trainer's window."""
        return Rows(self.offset_bytes, self.nbytes // self.num_rows, self.num_rows, self.pitch_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(SourceRead):
    """A read into the landing buffer, in which the rows lie end to end."""

    landing_offset_bytes: int

    @property
    def target(self) -> Rows:
        """Where the bytes land in the buffer."""
        row_nbytes = self.nbytes // self.num_rows
        pitch = row_nbytes if self.num_rows > 1 else 0
        return Rows(self.landing_offset_bytes, row_nbytes, self.num_rows, pitch)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectRead(SourceRead):
    """A read into an engine's window itself."""

    target_window: str
    target_offset_bytes: int
    target_pitch_bytes: int = 0

    @property
    def target(self) -> Rows:
        """Where the bytes land in the engine's window."""
        row_nbytes = self.nbytes // self.num_rows
        return Rows(self.target_offset_bytes, row_nbytes, self.num_rows, self.target_pitch_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One region's way from the landing buffer to an engine window; strides follow the tensor's dims.

    ``source_dtype`` is that of the landed elements. ``method`` and ``reason`` say how they were read and why,
    in the words of :class:`rdt_core.read_method.Method`.
    """

    tensor: str
    region: Region
    source_dtype: str
    landing_offset_bytes: int
    landing_stride_bytes: tuple[int, ...]
    window: str
    target_dtype: str
    target_offset_bytes: int
    target_stride_bytes: tuple[int, ...]
    trainer_rank: int
    method: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The reads and copies of one engine rank.

    Args:
        engine_rank: whose plan this is.
        reads: by trainer rank; within one rank first ranges, then rows, each by window and offset.
        copies: cover every shard of the engine's manifest exactly once, together with ``direct``.
        landing_nbytes: size of the landing buffer.
        payload_nbytes: bytes that are needed; ``read_nbytes - payload_nbytes`` is read in vain because a
            strided source is read as one span.
        num_tensors: distinct tensors that are read.
        direct: by trainer rank, reads that need no copy (in-place mode only, see ``rdt_core.direct``).
        arenas: by trainer rank, what it lays out for this engine rank at every publish, in order (see
            :func:`rdt_core.arena.place_items`).
    """

    engine_rank: int
    reads: Mapping[int, tuple[Read, ...]] = field(default_factory=dict)
    copies: tuple[Copy, ...] = ()
    landing_nbytes: int = 0
    payload_nbytes: int = 0
    num_tensors: int = 0
    direct: Mapping[int, tuple[DirectRead, ...]] = field(default_factory=dict)
    arenas: Mapping[int, tuple[ArenaItem, ...]] = field(default_factory=dict)

    @property
    def trainer_ranks(self) -> tuple[int, ...]:
        """Whom this engine rank reads from, ascending."""
        return tuple(sorted({*self.reads, *self.direct}))

    @property
    def arena_bytes(self) -> int:
        """What this engine rank asks trainer ranks to hold beside their parameters."""
        return sum(place_items(items)[1] for items in self.arenas.values())

    @property
    def read_nbytes(self) -> int:
        """Bytes that cross the link at every version."""
        return sum(read.nbytes for rank in self.trainer_ranks for read in self.reads_from(rank))

    @property
    def num_reads(self) -> int:
        """Descriptors a version."""
        return sum(len(self.reads_from(rank)) for rank in self.trainer_ranks)

    def reads_from(self, rank: int) -> tuple[Read | DirectRead, ...]:
        """All reads from one trainer rank, in the order of its export: into landing memory, then direct."""
        return (*self.reads.get(rank, ()), *self.direct.get(rank, ()))
