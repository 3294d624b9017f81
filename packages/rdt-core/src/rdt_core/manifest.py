"""What one rank holds (trainer) or wants filled (engine), in regions of checkpoint tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.region import Region


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
    windows: Mapping[str, Window] = field(default_factory=dict)
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)
