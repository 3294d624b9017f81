"""Trainer ranks as the coordinator of their group knows them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.words import TrainerTask


@dataclass(slots=True)
class KnownTrainer:
    """What a rank has said last, and what it is to do next."""

    instance: str
    manifest: bytes
    last_seen: float
    version: int = 0
    awaits_publish: bool = False  # of the version, which a sign of life has told first
    is_writing: bool = False
    is_leaving: bool = False
    arena_bytes: int = 0
    tasks: deque[TrainerTask] = field(default_factory=deque)

    def describe(self, now: float) -> dict[str, Any]:
        """Plain values for people and tools; ``now`` is the coordinator's clock."""
        return {
            "version": self.version,
            "writing": self.is_writing,
            "silent_s": round(now - self.last_seen, 3),
            "arena_bytes": self.arena_bytes,
        }


def topology_of(trainers: Mapping[int, KnownTrainer]) -> str:
    """Identifies the processes of all ranks."""
    return ",".join(f"{rank}:{trainer.instance}" for rank, trainer in sorted(trainers.items()))


def ranks_behind(trainers: Mapping[int, KnownTrainer], world_size: int, version: int) -> tuple[int, ...]:
    """Ranks that have not published ``version`` yet; before the first is known, there is one at least."""
    held = {rank: trainer.version for rank, trainer in trainers.items()}
    return tuple(rank for rank in range(max(1, world_size)) if held.get(rank, 0) < version)


def ranks_writing(trainers: Mapping[int, KnownTrainer], version: int) -> tuple[int, ...]:
    """Ranks that published ``version`` and have begun to write again."""
    found = sorted(trainers.items())
    return tuple(rank for rank, trainer in found if trainer.version == version and trainer.is_writing)
