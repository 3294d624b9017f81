"""A trainer rank as the coordinator of its group knows it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
