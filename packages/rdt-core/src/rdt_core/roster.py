"""The trainer ranks of a group as its coordinator knows them, and what they hold together."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rdt_core.signals import Signal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rdt_core.words import TrainerTask

SILENT_S = 10.0
"""A trainer rank that has given no sign of life for this long counts as gone."""


@dataclass(slots=True, eq=False, kw_only=True)
class KnownTrainer:
    """What a rank has said last, and what it is to do next.

    ``version`` and ``is_writing`` are changed by :meth:`Roster.note` alone. ``changed`` tells of tasks, signs
    of life, and that the rank has left or was replaced.
    """

    instance: str
    manifest: bytes
    last_seen: float
    changed: Signal
    version: int
    is_writing: bool
    awaits_publish: bool = False  # of the version, which a sign of life has told first
    is_leaving: bool = False
    arena_bytes: int = 0
    tasks: deque[TrainerTask] = field(default_factory=deque)

    def ask(self, task: TrainerTask) -> None:
        """Have the rank do something."""
        self.tasks.append(task)
        self.changed.wake()

    def describe(self, now: float) -> dict[str, Any]:
        """Plain values for people and tools; ``now`` is the coordinator's clock."""
        return {
            "version": self.version,
            "writing": self.is_writing,
            "silent_s": round(now - self.last_seen, 3),
            "arena_bytes": self.arena_bytes,
        }


class Roster:
    """All trainer ranks. What every call of a sync asks takes no longer for a thousand of them than for one.

    Args:
        clock: seconds, growing.

    Attributes:
        world_size: number of ranks of the group, 0 before the first has attached.
        changed: tells that a rank has attached, left or spoken again.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.world_size = 0
        self.changed = Signal(clock)
        self._clock = clock
        self._known: dict[int, KnownTrainer] = {}
        self._holding: Counter[int] = Counter()
        self._writing: Counter[int] = Counter()
        self._topology: str | None = None

    def __iter__(self) -> Iterator[tuple[int, KnownTrainer]]:
        """Ranks in order."""
        return iter(sorted(self._known.items()))

    def __contains__(self, rank: int) -> bool:
        """Whether the rank has attached and not left."""
        return rank in self._known

    def __len__(self) -> int:
        """How many have attached and not left."""
        return len(self._known)

    def __getitem__(self, rank: int) -> KnownTrainer:
        """A rank that has attached and not left; KeyError for another."""
        return self._known[rank]

    def get(self, rank: int) -> KnownTrainer | None:
        """A rank that has attached and not left."""
        return self._known.get(rank)

    def enter(self, rank: int, trainer: KnownTrainer) -> None:
        """A rank has attached; the process that it replaces has left."""
        self.drop(rank)
        self._known[rank] = trainer
        self._count(trainer, 1)
        self._tell()

    def drop(self, rank: int) -> None:
        """A rank has left, if it was there."""
        trainer = self._known.pop(rank, None)
        if trainer is not None:
            self._count(trainer, -1)
            trainer.changed.wake()
            self._tell()

    def clear(self) -> None:
        """All have left."""
        for rank in list(self._known):
            self.drop(rank)

    def note(self, trainer: KnownTrainer, version: int, *, is_writing: bool) -> None:
        """What a rank of the roster holds now, and whether it has begun to write again."""
        self._count(trainer, -1)
        trainer.version, trainer.is_writing = version, is_writing
        self._count(trainer, 1)

    def hear(self, trainer: KnownTrainer) -> None:
        """A rank of the roster has given a sign of life."""
        was_silent, trainer.last_seen = self.is_silent(trainer), self._clock()
        trainer.changed.wake()
        if was_silent:
            self.changed.wake()

    @property
    def newest(self) -> int:
        """The highest version that a rank has published; 0 for none."""
        return max(self._holding, default=0)

    @property
    def topology(self) -> str:
        """Identifies the processes of all ranks; another one when any was replaced."""
        if self._topology is None:
            instances = ",".join(f"{rank}:{trainer.instance}" for rank, trainer in self)
            self._topology = hashlib.sha256(instances.encode()).hexdigest()
        return self._topology

    def have_published(self, version: int) -> bool:
        """Whether every rank has published ``version`` or a later one."""
        is_complete = 0 < self.world_size <= len(self._known)
        return is_complete and min(self._holding, default=0) >= version

    def are_writing(self, version: int) -> bool:
        """Whether a rank that published ``version`` has begun to write again."""
        return self._writing[version] > 0

    def ranks_behind(self, version: int) -> tuple[int, ...]:
        """Ranks that have not published ``version`` yet; before the first is known, there is one at least."""
        held = {rank: trainer.version for rank, trainer in self}
        return tuple(rank for rank in range(max(1, self.world_size)) if held.get(rank, 0) < version)

    def ranks_writing(self, version: int) -> tuple[int, ...]:
        """Ranks that published ``version`` and have begun to write again."""
        return tuple(rank for rank, trainer in self if trainer.version == version and trainer.is_writing)

    def is_silent(self, trainer: KnownTrainer) -> bool:
        """Whether a rank counts as gone though it has not left."""
        return self._clock() - trainer.last_seen > SILENT_S

    def is_alive(self, rank: int) -> bool:
        """Whether a rank has attached, not left, and does not count as gone."""
        trainer = self._known.get(rank)
        return trainer is not None and not self.is_silent(trainer)

    def are_complete(self) -> bool:
        """Whether all ranks of the group are alive."""
        return 0 < self.world_size <= len(self._known) and not self.missing()

    def missing(self) -> tuple[int, ...]:
        """Ranks of the group that are not alive."""
        return tuple(rank for rank in range(self.world_size) if not self.is_alive(rank))

    def _count(self, trainer: KnownTrainer, number: int) -> None:
        self._writing[trainer.version] += number * trainer.is_writing
        self._holding[trainer.version] += number
        if not self._holding[trainer.version]:
            # Its least and its greatest are asked for, and versions come and go for weeks.
            del self._holding[trainer.version], self._writing[trainer.version]

    def _tell(self) -> None:
        self._topology = None
        self.changed.wake()
