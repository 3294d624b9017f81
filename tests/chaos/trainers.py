"""The trainer ranks of a chaos run: Ray actors that write a version in place every second."""

from __future__ import annotations

from typing import Any

import ray

from rdt_core.errors import RdtError
from tests.chaos.model import list_shapes, values_of
from tests.integration.toy_trainer import ToyTrainer

NUM_RANKS = 2
WRITE_TIMEOUT_S = 3.0
CALL_TIMEOUT_S = 180.0


class ChaosTrainer(ToyTrainer):
    """One trainer rank. As an actor."""

    def step(self, version: int) -> None:
        """One optimizer step: whoever still reads after three seconds is cut off."""
        with self.publisher.writing(timeout_s=WRITE_TIMEOUT_S):
            for shard in self._shards:
                whole = values_of(shard.spec.name, shard.spec.shape, version)
                box = zip(shard.region.start, shard.region.stop, strict=True)
                shard.data.copy_(whole[tuple(slice(a, b) for a, b in box)])
        self.publisher.publish(version)


class Trainers:
    """All ranks of a group, replaced together when one has died.

    Args:
        group: the name of the sync group.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._ranks: list[Any] = []
        self.pids: list[int] = []

    def start(self) -> None:
        """In place of those that there are. Blocks until they have attached."""
        self.stop()
        actor = ray.remote(ChaosTrainer).options(num_cpus=0)
        self._ranks = [actor.remote(rank, NUM_RANKS, shapes=list_shapes()) for rank in range(NUM_RANKS)]
        attached = [rank.attach.remote(self._group) for rank in self._ranks]
        self.pids = ray.get(attached, timeout=CALL_TIMEOUT_S)

    def step(self, version: int) -> bool:
        """Write and publish a version in every rank; whether all did."""
        steps = [rank.step.remote(version) for rank in self._ranks]
        try:
            ray.get(steps, timeout=CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, RdtError):
            return False
        return True

    def are_alive(self) -> bool:
        """Whether every rank's process still runs, stopped or not."""
        from pathlib import Path

        return all(Path(f"/proc/{pid}").exists() for pid in self.pids)

    def stop(self) -> None:
        """End every rank. Idempotent."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []
