"""What the recorder found out about an engine's loader."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from rdt_core.manifest import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """Elements that the loader sets to a constant: the padding of a vocabulary, a zeroed bias.

    Args:
        window: whose memory is filled.
        offset_bytes: of the first element in the window.
        shape: of the strided box that is filled, in elements; its dims are no tensor's.
        stride_bytes: one a dim of ``shape``.
        dtype: element type in memory.
        value: what every element becomes, rounded to ``dtype`` as ``Tensor.fill_`` does.
    """

    window: str
    offset_bytes: int
    shape: tuple[int, ...]
    stride_bytes: tuple[int, ...]
    dtype: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Where every checkpoint tensor lands in one engine rank.

    Args:
        shards: regions of checkpoint tensors in engine windows; ``dtype`` is the parameter's own.
        windows: by name, a flat uint8 view of the live storage of a parameter or buffer (the name is the
            first parameter that owns the storage).
        reload: tensors that no read can express, with the loader operation that made it so; they are
            brought whole and given to ``EngineModel.load``.
        fills: constants that the loader writes; disjoint from the shards. An engine that was started from a
            checkpoint holds them already, one that was started with random weights does not. They hold
            after ``EngineModel.load``, which may have written there.
        skipped: tensors that the loader takes and drops by design (a tied ``lm_head.weight``, say).
    """

    shards: tuple[Shard, ...]
    windows: Mapping[str, torch.Tensor]
    reload: Mapping[str, str] = field(default_factory=dict)
    fills: tuple[Fill, ...] = ()
    skipped: frozenset[str] = frozenset()
