"""What one rank holds (trainer) or wants filled (engine), in regions of checkpoint tensors."""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import span_nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.region import Region

SIDES = ("trainer", "engine")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor of the checkpoint namespace: its global shape in elements, and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Window:
    """One storage of a rank that peers may read (trainer) or that is written at commit (engine).

    Args:
        name: unique in its manifest; the parameter that owns the storage.
        nbytes: size of the readable part in bytes.
    """

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Where one rank holds a region of a tensor.

    Element ``region.start + i`` of the tensor lies at byte ``offset_bytes + sum(i[d] * stride_bytes[d])``
    of the window. Strides follow the *tensor's* dims, so a transposed copy is only another order of
    strides.

    Args:
        tensor: checkpoint (HF) name.
        region: the box held, global coordinates in elements.
        window: name of the window that holds it.
        offset_bytes: of the region's first element in the window.
        stride_bytes: one a dim of the tensor.
        dtype: element type in memory.
    """

    tensor: str
    region: Region
    window: str
    offset_bytes: int
    stride_bytes: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the elements held, without what lies between them."""
        return self.region.num_elements * itemsize_bytes(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that one rank of one side tells the other about its memory. Immutable; addresses stay home.

    Args:
        side: ``"trainer"`` or ``"engine"``.
        rank: global rank on its own side.
        world_size: number of ranks on its own side.
        node: identifies the host, to prefer near replicas.
        device: ``"cpu"``, ``"cuda:0"``, ...
        transports: names of those that this process can use for that device.
        windows: by name.
        tensors: specs of every tensor named by a shard, global shapes. On the engine side the dtype is
            the trainer's, as the engine was told it.
        shards: what is held.
    """

    side: str
    rank: int
    world_size: int
    node: str
    device: str
    transports: tuple[str, ...] = ()
    windows: Mapping[str, Window] = field(default_factory=dict)
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)


def find_fault(manifest: Manifest) -> str | None:
    """What is wrong with a manifest, in words that name the shard, or None when nothing is.

    Checks that every name resolves, every region lies in its tensor's shape, and every element of every
    shard lies in its window on a multiple of its size. The wire format asks on both ends.

    Raises:
        UnknownDtypeError: a dtype is not one that this project moves.
    """
    found = _find_header_fault(manifest)
    checks = (
        (_find_window_fault(*item) for item in manifest.windows.items()),
        (_find_spec_fault(*item) for item in manifest.tensors.items()),
        (_find_shard_fault(manifest, shard) for shard in manifest.shards),
    )
    return found or next(filter(None, itertools.chain(*checks)), None)


def _find_header_fault(manifest: Manifest) -> str | None:
    if manifest.side not in SIDES:
        return f"side is {manifest.side!r}, expected one of {SIDES}"
    if not 0 <= manifest.rank < manifest.world_size:
        return f"rank {manifest.rank} is not one of {manifest.world_size} ranks"
    return None


def _find_window_fault(name: str, window: Window) -> str | None:
    if name != window.name:
        return f"window {window.name!r} is filed under {name!r}"
    return f"window {name!r} has {window.nbytes} bytes" if window.nbytes < 0 else None


def _find_spec_fault(name: str, spec: TensorSpec) -> str | None:
    itemsize_bytes(spec.dtype)
    if name != spec.name:
        return f"tensor {spec.name!r} is filed under {name!r}"
    return f"tensor {name!r} has shape {spec.shape}" if min(spec.shape, default=0) < 0 else None


def _find_shard_fault(manifest: Manifest, shard: Shard) -> str | None:
    spec, window = manifest.tensors.get(shard.tensor), manifest.windows.get(shard.window)
    if spec is None or window is None:
        return f"a shard of {shard.tensor!r} in window {shard.window!r} names one that is not described"
    stop, shape = shard.region.stop, spec.shape
    if not len(shard.stride_bytes) == len(stop) == len(shape):
        return f"{shard.tensor}{shard.region} and its strides must have {len(shape)} dims"
    if any(map(operator.gt, stop, shape)):
        return f"{shard.tensor}{shard.region} lies outside of its shape {shape}"
    return _find_memory_fault(shard, window)


def _find_memory_fault(shard: Shard, window: Window) -> str | None:
    itemsize, offset, strides = itemsize_bytes(shard.dtype), shard.offset_bytes, shard.stride_bytes
    if min(strides, default=0) < 0 or offset < 0:
        return f"{shard.tensor}{shard.region} has a negative offset or stride"
    if math.gcd(itemsize, offset, *strides) != itemsize:
        return f"{shard.tensor}{shard.region} is not aligned to its {itemsize}-byte elements"
    if offset + span_nbytes(shard.region.shape, strides, itemsize) > window.nbytes:
        return f"{shard.tensor}{shard.region} reaches beyond the {window.nbytes} bytes of {window.name!r}"
    return None
