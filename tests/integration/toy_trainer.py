"""Trainer ranks as Ray actors that hold a toy model's tensors cut along one dim, in one storage a tensor."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import ray
import torch

from rdt_core import LocalShard, LocalShards, Region, TensorSpec, WeightPublisher

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.client import Channel

HIDDEN = 64
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (100, HIDDEN),
    "q.weight": (HIDDEN, HIDDEN),
    "k.weight": (HIDDEN, HIDDEN),
    "v.weight": (HIDDEN, HIDDEN),
    "norm.weight": (HIDDEN,),
}


def values_of(name: str, shape: tuple[int, ...], version: int, dtype: torch.dtype) -> torch.Tensor:
    """What every element of a tensor holds at a version; whole, so that a test can compare."""
    seed = torch.Generator().manual_seed(
        sorted(SHAPES).index(name) * 1000 + version if name in SHAPES else version
    )
    return torch.randn(shape, generator=seed).to(dtype)


def cut_evenly(
    rank: int, world_size: int, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, dim: int
) -> list[LocalShard]:
    """This rank's part of every tensor along ``dim``, or along the last dim of those that have fewer."""
    shards = []
    for name, shape in shapes.items():
        axis = min(dim, len(shape) - 1)
        size = -(-shape[axis] // world_size)
        start, stop = min(rank * size, shape[axis]), min((rank + 1) * size, shape[axis])
        if start == stop:
            continue
        begin = (0,) * len(shape)
        region = Region((*begin[:axis], start, *begin[axis + 1 :]), (*shape[:axis], stop, *shape[axis + 1 :]))
        spec = TensorSpec(name, shape, str(dtype).removeprefix("torch."))
        shards.append(
            LocalShard(spec=spec, region=region, data=torch.zeros(region.shape, dtype=dtype), owner=name)
        )
    return shards


class ToyTrainer:
    """One trainer rank. As an actor: ``ray.remote(ToyTrainer)``."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        dtype: str = "float32",
        dim: int = 0,
    ) -> None:
        self._rank = rank
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._shards = cut_evenly(rank, world_size, shapes or SHAPES, self._dtype, dim)
        self._local = LocalShards(
            rank=rank,
            world_size=world_size,
            shards=tuple(self._shards),
            locate=lambda: tuple(shard.data.data_ptr() for shard in self._shards),
        )
        self._publisher: WeightPublisher | None = None

    @property
    def local(self) -> LocalShards:
        return self._local

    def attach(self, group: str, channel: Channel | None = None) -> int:
        self._publisher = WeightPublisher.attach(group, self._local, channel=channel)
        return os.getpid()

    def write(self, version: int) -> None:
        """Write a version's values in place, as an optimizer step does."""
        for shard in self._shards:
            whole = values_of(shard.spec.name, shard.spec.shape, version, self._dtype)
            box = zip(shard.region.start, shard.region.stop, strict=True)
            shard.data.copy_(whole[tuple(slice(a, b) for a, b in box)])

    def publish(self, version: int) -> None:
        self.publisher.publish(version)

    def arena_bytes(self) -> int:
        return self.publisher.arena_bytes

    def close(self) -> None:
        self.publisher.close()

    def move_memory(self) -> None:
        """Re-allocate one parameter behind the publisher's back."""
        first = self._shards[0]
        self._shards[0] = LocalShard(
            spec=first.spec, region=first.region, data=first.data.clone(), owner=first.owner
        )

    @property
    def publisher(self) -> WeightPublisher:
        if self._publisher is None:
            raise RuntimeError("attach first")
        return self._publisher


def start_trainers(world_size: int, **kwargs: Any) -> list[Any]:
    """Actors, not yet attached."""
    actor = ray.remote(ToyTrainer).options(num_cpus=0)
    return [actor.remote(rank, world_size, **kwargs) for rank in range(world_size)]


def kill_process(pid: int) -> None:
    """End a trainer rank as a crash would."""
    os.kill(pid, signal.SIGKILL)
