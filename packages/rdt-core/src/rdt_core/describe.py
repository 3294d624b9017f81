"""From live tensors to a manifest and the windows behind it; the same for every exporter."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rdt_core.collection import paused_collection
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.transports.offers import offered_transports

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rdt_core.local_shards import LocalShard, LocalShards

_ALIGNMENT = 16  # of the widest element


@dataclass(frozen=True, slots=True)
class Described:
    """A trainer rank's manifest and, by window name, flat uint8 views of the live memory."""

    manifest: Manifest
    windows: Mapping[str, torch.Tensor]


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def node_name() -> str:
    """Identifies this host to the planner."""
    return socket.gethostname()


def device_name(device: torch.device) -> str:
    """Identifies a GPU, however processes number it; empty for the host, and where it cannot be told."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def span_bytes(data: torch.Tensor) -> tuple[int, int]:
    """Half-open byte range that ``data`` touches in its storage."""
    itemsize = data.element_size()
    start = int(data.storage_offset()) * itemsize
    if data.is_contiguous():
        return start, start + data.numel() * itemsize
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(data.shape, data.stride(), strict=True))
    return start, start + (last + 1) * itemsize if data.numel() else start


def flat_bytes(data: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Bytes ``[start, stop)`` of the storage behind ``data`` as a live one-dimensional uint8 tensor."""
    out = torch.empty(0, dtype=torch.uint8, device=data.device)
    out.set_(data.untyped_storage(), start, (stop - start,), (1,))
    return out


def typed_view(
    flat: torch.Tensor, dtype: str, shape: Sequence[int], offset_bytes: int, stride_bytes: Sequence[int]
) -> torch.Tensor:
    """A strided view of a flat uint8 tensor in another dtype. Offsets and strides in bytes of ``flat``."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    itemsize = torch_dtype.itemsize
    usable = flat[: flat.numel() // itemsize * itemsize].view(torch_dtype)
    base = usable.storage_offset() + offset_bytes // itemsize
    return usable.as_strided(tuple(shape), tuple(s // itemsize for s in stride_bytes), base)


class LiveWindows(Mapping[str, torch.Tensor]):
    """Flat uint8 views of live memory by window name, each made when it is asked for: few are of very many.

    Args:
        spans: for every window a tensor of its storage, and the half-open byte range in that.
    """

    def __init__(self, spans: Mapping[str, tuple[torch.Tensor, int, int]]) -> None:
        self._spans = spans

    def __getitem__(self, name: str) -> torch.Tensor:
        return flat_bytes(*self._spans[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)


@paused_collection()
def describe_trainer(local: LocalShards) -> Described:
    """The manifest of one trainer rank. No collective, no copy; linear in the number of shards."""
    groups: dict[int, list[LocalShard]] = {}
    for shard in local.shards:
        groups.setdefault(shard.data.untyped_storage().data_ptr(), []).append(shard)
    spans: dict[str, tuple[torch.Tensor, int, int]] = {}
    shards: list[Shard] = []
    for members in groups.values():
        starts, stops = zip(*[span_bytes(shard.data) for shard in members], strict=True)
        # Rounding down keeps every dtype's elements aligned to the window's first byte.
        start = min(starts) // _ALIGNMENT * _ALIGNMENT
        name = members[0].owner
        spans[name] = members[0].data, start, max(stops)
        for shard, first in zip(members, starts, strict=True):
            shards.append(_shard_in(name, shard, first - start))
    device = str(local.shards[0].data.device) if local.shards else "cpu"
    return Described(
        Manifest(
            side="trainer",
            rank=local.rank,
            world_size=local.world_size,
            node=node_name(),
            device=device,
            transports=offered_transports(device),
            windows={name: Window(name, stop - start) for name, (_, start, stop) in spans.items()},
            tensors={spec.name: spec for spec in (*local.known, *(shard.spec for shard in local.shards))},
            shards=tuple(shards),
        ),
        LiveWindows(spans),
    )


def _shard_in(window: str, shard: LocalShard, offset_bytes: int) -> Shard:
    data = shard.data
    itemsize = data.element_size()
    return Shard(
        tensor=shard.spec.name,
        region=shard.region,
        window=window,
        offset_bytes=offset_bytes,
        stride_bytes=tuple([stride * itemsize for stride in data.stride()]),
        dtype=dtype_name(data.dtype),
    )


def whole_spec(name: str, data: torch.Tensor) -> TensorSpec:
    """The spec of a tensor that is held whole."""
    return TensorSpec(name, tuple(data.shape), dtype_name(data.dtype))
