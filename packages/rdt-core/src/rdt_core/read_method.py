"""How a piece of trainer memory comes to an engine rank, and why: the cost model behind every plan.

*Direct*: the bytes as they lie, contiguous. *Runs* and *span*: a strided piece, run by run or as the one
range that encloses it. *Rows*: a strided piece over a link that takes it as it lies, in one read. *Packed*
and *cast*: the trainer rank lays the piece out in an arena at every
publish, in the engine's order and, where that is narrower, in the engine's dtype; the engine reads the arena.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.errors import ConfigError
from rdt_core.layout import Cut, find_cuts, is_contiguous, row_major_strides
from rdt_core.row_blocks import Rows, find_row_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdt_core.manifest import Shard
    from rdt_core.region import Region

MAX_BLOCKS = 1 << 20
"""Of one piece: more reads would take longer than reading what lies between them, and a plan lists each."""

NEVER = "never"
ARENA_POLICIES = ("auto", NEVER)

_Memory = tuple[int, str, int]  # trainer rank, window, offset

# Bytes read plus bytes written, a second, by a copy inside one device: measured for two CPU cores
# (benchmarks/sync.py, copy_in_process), two thirds of an H100's peak for CUDA.
_COPY_BYTES_PER_S = {"cpu": 1.6e10, "cuda": 2e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPrice:
    """What reading over one link costs.

    Args:
        bytes_per_s: throughput.
        per_read_s: what every read costs on top of its bytes, in seconds.
        takes_rows: whether one read may bring rows that lie apart, wherever they are to lie.
    """

    bytes_per_s: float
    per_read_s: float
    takes_rows: bool = False

    def price_s(self, cut: Cut) -> float:
        """Seconds that reading all blocks of ``cut`` takes."""
        return cut.num_blocks * self.per_read_s + cut.nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCost:
    """What reading costs, to decide how every piece is read.

    Args:
        bytes_per_s: throughput of one link.
        per_read_s: what every read costs on top of its bytes, in seconds.
        max_over_read: largest allowed ratio of bytes read to bytes needed; bounds the landing buffer.
        arenas: ``"auto"`` has trainer ranks lay out what is cheaper to read that way; ``"never"`` takes no
            memory of theirs, whatever the reads cost.
        by_trainer: prices of the links to some trainer ranks, where they are known to differ.

    Raises:
        ConfigError: a value is not positive, ``max_over_read`` is below 1, or ``arenas`` is another word.
    """

    bytes_per_s: float = 5e9
    per_read_s: float = 2e-6
    max_over_read: float = 8.0
    arenas: str = "auto"
    by_trainer: Mapping[int, LinkPrice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.per_read_s >= 0 and self.max_over_read >= 1):
            raise ConfigError(
                f"{self} cannot price reads. Use bytes_per_s > 0, per_read_s >= 0 and max_over_read >= 1."
            )
        if self.arenas not in ARENA_POLICIES:
            raise ConfigError(f"arenas={self.arenas!r} is not a policy. Use one of {ARENA_POLICIES}.")

    def of(self, trainer_rank: int) -> LinkPrice:
        """The price of the link to one trainer rank."""
        general = LinkPrice(bytes_per_s=self.bytes_per_s, per_read_s=self.per_read_s)
        return self.by_trainer.get(trainer_rank, general)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A region that one trainer shard holds and one engine shard needs.

    Args:
        trainer_rank: who holds it.
        source: the trainer's shard.
        target: the engine's shard.
        region: lies in both shards' regions and is not empty.
        nbytes: of its elements in the trainer's memory.
        source_offset_bytes: of its first element in the trainer's window.
        source_device: of the trainer rank.
        target_device: of the engine rank.
    """

    trainer_rank: int
    source: Shard
    target: Shard
    region: Region
    nbytes: int
    source_offset_bytes: int
    source_device: str = "cpu"
    target_device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Method:
    """How one piece is read.

    Args:
        name: ``direct``, ``runs``, ``span``, ``rows``, ``packed`` or ``cast``.
        reason: why, for people.
        cut: the blocks to read from the trainer's window; None for rows, and when an arena is read instead.
        dtype: of the elements that land.
        rows: the rows to read from the trainer's window, from the piece's first element on, in its order.
    """

    name: str
    reason: str
    cut: Cut | None
    dtype: str
    rows: tuple[Rows, ...] = ()

    @property
    def is_strided(self) -> bool:
        """Whether the trainer's own memory is read and does not hold the piece in one range."""
        return self.name in ("runs", "span")

    @property
    def goes_by_arena(self) -> bool:
        """Whether the trainer rank lays the piece out."""
        return self.cut is None and not self.rows


def choose_methods(pieces: Sequence[Piece], cost: ReadCost) -> list[Method]:
    """The cheapest way for every piece of one plan, in order."""
    found = [_choose_direct(piece, cost) for piece in pieces]
    if cost.arenas == NEVER:
        return found
    whole = _find_wholly_needed([p for p, method in zip(pieces, found, strict=True) if method.is_strided])
    return [_prefer_arena(piece, method, cost, whole) for piece, method in zip(pieces, found, strict=True)]


def read_as_span(piece: Piece, reason: str) -> Method:
    """The piece as the one range that encloses it, for when no strides could describe its runs."""
    return Method("span", reason, only_cut(piece), piece.source.dtype)


def only_cut(piece: Piece) -> Cut:
    """The one range that encloses the piece."""
    return _cuts(piece)[-1]


def _choose_direct(piece: Piece, cost: ReadCost) -> Method:
    """As rows where the link takes them; else the cheapest cut that over-reads no more than allowed."""
    cuts = _cuts(piece)
    if len(cuts) == 1:
        return Method("direct", "contiguous", cuts[0], piece.source.dtype)
    price = cost.of(piece.trainer_rank)
    rows = _find_rows(piece) if price.takes_rows else ()
    if rows:
        reason = f"{sum(part.num_rows for part in rows)} rows of {rows[0].row_nbytes} bytes"
        return Method("rows", reason, None, piece.source.dtype, rows)
    most = cost.max_over_read * piece.nbytes
    allowed = [cut for cut in cuts if cut.nbytes <= most] or cuts[:1]
    cut = min(allowed, key=lambda cut: (price.price_s(cut), cut.num_blocks))
    reason = f"{cut.num_blocks} reads of {cut.block_nbytes} bytes for {piece.nbytes}"
    return Method("span" if cut.num_blocks == 1 else "runs", reason, cut, piece.source.dtype)


def _find_rows(piece: Piece) -> tuple[Rows, ...]:
    """The piece in the order of its elements; empty where it is not made of rows worth the name."""
    shape, itemsize = piece.region.shape, itemsize_bytes(piece.source.dtype)
    strides = piece.source.stride_bytes
    if any(n > 1 and stride == 0 for n, stride in zip(shape, strides, strict=True)):
        return ()
    blocks = find_row_blocks(shape, strides, row_major_strides(shape, itemsize), itemsize) or ()
    return tuple(Rows(block.source, block.row_nbytes, block.num_rows, block.source_pitch) for block in blocks)


def _cuts(piece: Piece) -> list[Cut]:
    """Every way to read a piece that a plan has room for; the range around it is always one."""
    found = find_cuts(piece.region.shape, piece.source.stride_bytes, itemsize_bytes(piece.source.dtype))
    return [cut for cut in found if cut.num_blocks <= MAX_BLOCKS]


def _find_wholly_needed(pieces: Sequence[Piece]) -> set[_Memory]:
    """Trainer shards without gaps of which the pieces together need every element."""
    needed: dict[_Memory, set[Region]] = {}
    for piece in pieces:
        if is_contiguous(
            piece.source.region.shape, piece.source.stride_bytes, itemsize_bytes(piece.source.dtype)
        ):
            needed.setdefault(_memory_of(piece), set()).add(piece.region)
    sizes = {_memory_of(piece): piece.source.region.num_elements for piece in pieces}
    return {
        memory for memory, regions in needed.items() if sum(r.num_elements for r in regions) >= sizes[memory]
    }


def _memory_of(piece: Piece) -> _Memory:
    return piece.trainer_rank, piece.source.window, piece.source.offset_bytes


def _prefer_arena(piece: Piece, found: Method, cost: ReadCost, whole: set[_Memory]) -> Method:
    """An arena in place of the method found, where that is needed and cheaper."""
    dtype = _arena_dtype(piece)
    is_narrowed = dtype != piece.source.dtype
    # What lies between the runs of a wholly needed shard is read for other pieces: the runs unite.
    if not (is_narrowed or (found.is_strided and _memory_of(piece) not in whole)):
        return found
    price = cost.of(piece.trainer_rank)
    direct_s = _price_read_s(piece, found, price) + _commit_s(piece, piece.nbytes)
    arena_s = _price_arena_s(piece, dtype, price)
    if direct_s <= arena_s:
        return found
    reason = f"{arena_s * 1e3:.3g} ms by an arena of {dtype}, {direct_s * 1e3:.3g} ms as it lies"
    return Method("cast" if is_narrowed else "packed", reason, None, dtype)


def _arena_dtype(piece: Piece) -> str:
    """The narrower of both sides' dtypes: conversions that widen happen behind the link."""
    source, target = piece.source.dtype, piece.target.dtype
    return target if itemsize_bytes(target) < itemsize_bytes(source) else source


def _price_read_s(piece: Piece, method: Method, price: LinkPrice) -> float:
    """A row costs nothing beside its bytes (docs/performance.md)."""
    if method.cut is not None:
        return price.price_s(method.cut)
    return len(method.rows) * price.per_read_s + piece.nbytes / price.bytes_per_s


def _price_arena_s(piece: Piece, dtype: str, price: LinkPrice) -> float:
    """One item's copy costs what a read costs on top of its bytes; the arena itself is one read."""
    nbytes = piece.region.num_elements * itemsize_bytes(dtype)
    refresh_s = (piece.nbytes + nbytes) / _copy_bytes_per_s(piece.source_device)
    return price.per_read_s + nbytes / price.bytes_per_s + refresh_s + _commit_s(piece, nbytes)


def _commit_s(piece: Piece, landed_nbytes: int) -> float:
    written_nbytes = piece.region.num_elements * itemsize_bytes(piece.target.dtype)
    return (landed_nbytes + written_nbytes) / _copy_bytes_per_s(piece.target_device)


def _copy_bytes_per_s(device: str) -> float:
    return _COPY_BYTES_PER_S.get(device.partition(":")[0], _COPY_BYTES_PER_S["cpu"])
