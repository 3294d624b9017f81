"""A whole sync group inside one process: real publishers, subscribers and coordinator, memory for links."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rdt_core import LocalShards, WeightPublisher, WeightSubscriber
from rdt_core.client import CoordinatorClient, LocalChannel
from rdt_core.roster import SILENT_S
from rdt_core.subscriber import ConnectRequest
from tests.contract import gated
from tests.integration.toy_engine import ToyEngineModel, ToyModel, fingerprint
from tests.integration.toy_trainer import HIDDEN, SHAPES, cut_evenly, values_of

if TYPE_CHECKING:
    from rdt_core.local_shards import LocalShard

GROUP = "policy"


class Clock:
    """Real time, and as much more as a test has let pass."""

    def __init__(self) -> None:
        self._skipped_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._skipped_s

    def skip(self, seconds: float) -> None:
        """Let time pass at once."""
        self._skipped_s += seconds


class TrainerRank:
    """One trainer rank's live memory and its publisher."""

    def __init__(self, channel: LocalChannel, rank: int, world_size: int) -> None:
        self.shards: list[LocalShard] = cut_evenly(rank, world_size, SHAPES, torch.float32, dim=0)
        local = LocalShards(
            rank=rank,
            world_size=world_size,
            shards=tuple(self.shards),
            locate=lambda: tuple(shard.data.data_ptr() for shard in self.shards),
        )
        self.publisher = WeightPublisher.attach(GROUP, local, channel=channel)

    def write(self, version: int) -> None:
        """Write a version's values in place, as an optimizer step does."""
        for shard in self.shards:
            whole = values_of(shard.spec.name, shard.spec.shape, version, torch.float32)
            shard.data.copy_(whole[shard.region.start[0] : shard.region.stop[0]])

    def die(self) -> None:
        """Fall silent without a word, as a process that is killed."""
        self.publisher._is_closed.set()
        self.publisher._tasks.put(None)
        for thread in self.publisher._threads:
            thread.join(30)
        self.publisher._exports.close()


class Engine:
    """One engine of one rank: a toy model and its subscriber."""

    def __init__(self, channel: LocalChannel, name: str = "http://a") -> None:
        self.name = name
        self.model = ToyModel(100, torch.float32)
        self.engine_model = ToyEngineModel(self.model)
        self.subscriber = WeightSubscriber(self.engine_model, channel=channel)

    def connect(
        self, mode: str = "staged", transport: str = gated.NAME, read_share: float = 1.0
    ) -> dict[str, Any]:
        return self.subscriber.connect(
            ConnectRequest(
                group=GROUP, engine=self.name, transport=transport, mode=mode, read_share=read_share
            )
        )

    @property
    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.model)


@dataclass
class World:
    """A group with attached trainer ranks."""

    channel: LocalChannel
    trainers: list[TrainerRank]

    @property
    def client(self) -> CoordinatorClient:
        return CoordinatorClient(self.channel)

    def publish(self, version: int) -> None:
        """Every rank writes and publishes a version."""
        for rank in self.trainers:
            rank.write(version)
        for rank in self.trainers:
            rank.publisher.publish(version)
        self.client.wait_published(version, 30.0)

    def close(self) -> None:
        for rank in self.trainers:
            rank.publisher.close()
        self.channel.end()


def make_world(num_ranks: int = 2) -> World:
    channel = LocalChannel(GROUP)
    return World(channel, [TrainerRank(channel, rank, num_ranks) for rank in range(num_ranks)])


def count_anew(world: World, clock: Clock) -> World:
    """All trainers of a world die, and its coordinator with all it knew; others come in their place.

    Args:
        world: that is lost.
        clock: of its coordinator.
    """
    for rank in world.trainers:
        rank.die()
    clock.skip(2 * SILENT_S)
    world.channel.restart()
    return World(world.channel, [TrainerRank(world.channel, rank, 2) for rank in range(2)])


def expected_fingerprint(
    version: int, dtype: torch.dtype = torch.float32, vocab: int = 100
) -> dict[str, str]:
    """What the toy engine holds after a version has landed, made without any of our code on the way."""
    tensors = {
        name: values_of(name, shape, version, torch.float32).to(dtype) for name, shape in SHAPES.items()
    }
    embed = torch.zeros(128, HIDDEN, dtype=dtype)
    embed[:vocab] = tensors["embed.weight"]
    parameters = {
        "embed": embed,
        "qkv": torch.cat([tensors[f"{n}.weight"] for n in "qkv"]),
        "norm": tensors["norm.weight"],
        "head": embed,
    }
    return {
        name: hashlib.sha256(t.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in parameters.items()
    }
