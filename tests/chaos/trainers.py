"""The trainer ranks of a chaos run: Ray actors that write a version in place every second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from tests.chaos.model import list_shapes, values_of
from tests.integration.toy_trainer import ToyTrainer

NUM_RANKS = 2
WRITE_TIMEOUT_S = 3.0
CALL_TIMEOUT_S = 90.0
"""For all ranks to start or to take a step: longer than what either may wait for by itself."""


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
        """In place of those that there are. Blocks until they have attached.

        Raises:
            RdtError, ray.exceptions.RayError: a rank did not; then none counts as alive.
        """
        self.stop()
        actor = ray.remote(ChaosTrainer).options(num_cpus=0)
        self._ranks = [actor.remote(rank, NUM_RANKS, shapes=list_shapes()) for rank in range(NUM_RANKS)]
        attached = [rank.attach.remote(self._group) for rank in self._ranks]
        self.pids = ray.get(attached, timeout=CALL_TIMEOUT_S)

    def step(self, version: int) -> None:
        """Write and publish a version in every rank.

        Raises:
            RdtError, ray.exceptions.RayError: a rank did not. Others may have: the next step needs another
                version.
        """
        ray.get([rank.step.remote(version) for rank in self._ranks], timeout=CALL_TIMEOUT_S)

    def are_alive(self) -> bool:
        """Whether there are ranks and the process of each still runs, stopped or not."""
        return bool(self.pids) and all(Path(f"/proc/{pid}").exists() for pid in self.pids)

    def stop(self) -> None:
        """End every rank. Idempotent."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks, self.pids = [], []
