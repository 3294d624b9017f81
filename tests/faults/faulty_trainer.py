"""Toy trainer ranks that can be made to fail from within."""

from __future__ import annotations

import contextlib
from typing import Any

import ray

from tests.integration.toy_trainer import ToyTrainer

CUT_OFF_S = 1.0
"""How long a step that is going to fail waits for readers before it cuts them off."""


class StepError(Exception):
    """What an optimizer step raises that fails."""


class FaultyTrainer(ToyTrainer):
    """One trainer rank. As an actor."""

    def fail_in_step(self) -> None:
        """An optimizer step that raises: nobody may read what it left behind."""
        with contextlib.suppress(StepError), self.publisher.writing(timeout_s=CUT_OFF_S):
            raise StepError

    def fail_in_probe(self) -> None:
        """From now on raise whenever an engine wants to connect."""

        def probe(payload: Any) -> object:
            raise StepError(payload["reader"])

        self.publisher._exports.probe = probe  # type: ignore[method-assign]  # to break it


def start_faulty_trainers(world_size: int) -> list[Any]:
    """Actors, not yet attached."""
    actor = ray.remote(FaultyTrainer).options(num_cpus=0)
    return [actor.remote(rank, world_size) for rank in range(world_size)]
