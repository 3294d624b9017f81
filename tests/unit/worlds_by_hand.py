"""Small manifests written out by hand, for tests that are about one thing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import row_major_strides, span_nbytes
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "model.embed_tokens.weight"


def box(*bounds: tuple[int, int]) -> Region:
    """A region by its (start, stop) in every dim."""
    return Region(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


def dense_shard(
    region: Region, *, tensor: str = NAME, window: str = "w", offset: int = 0, dtype: str
) -> Shard:
    """A region that lies row-major in a window."""
    return Shard(
        tensor=tensor,
        region=region,
        window=window,
        offset_bytes=offset,
        stride_bytes=row_major_strides(region.shape, itemsize_bytes(dtype)),
        dtype=dtype,
    )


def holding(
    *regions: Region,
    shape: tuple[int, ...],
    side: str = "trainer",
    rank: int = 0,
    world_size: int = 16,
    node: str = "node0",
    tensor: str = NAME,
    dtype: str = "bfloat16",
) -> Manifest:
    """One rank that holds, or needs, row-major regions of one tensor behind each other in one window."""
    shards, end = [], 0
    for region in regions:
        shards.append(dense_shard(region, tensor=tensor, offset=end, dtype=dtype))
        end += span_nbytes(region.shape, shards[-1].stride_bytes, itemsize_bytes(dtype))
    return around(*shards, shapes={tensor: shape}, side=side, rank=rank, world_size=world_size, node=node)


def around(
    *shards: Shard,
    shapes: Mapping[str, tuple[int, ...]],
    side: str = "trainer",
    rank: int = 0,
    world_size: int = 16,
    node: str = "node0",
) -> Manifest:
    """A manifest of these shards, with windows just large enough."""
    windows: dict[str, int] = {}
    for shard in shards:
        span = span_nbytes(shard.region.shape, shard.stride_bytes, itemsize_bytes(shard.dtype))
        windows[shard.window] = max(windows.get(shard.window, 0), shard.offset_bytes + span)
    dtypes = {shard.tensor: shard.dtype for shard in shards}
    return Manifest(
        side=side,
        rank=rank,
        world_size=world_size,
        node=node,
        device="cpu",
        windows={name: Window(name, nbytes) for name, nbytes in windows.items()},
        tensors={
            name: TensorSpec(name, shape, dtypes.get(name, "bfloat16")) for name, shape in shapes.items()
        },
        shards=shards,
    )
