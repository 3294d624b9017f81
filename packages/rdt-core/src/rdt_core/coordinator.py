"""The one place where a sync group's metadata meets. No weight byte passes through it.

One named Ray actor a group runs this class; every method is a coroutine on its single event loop, so state
changes need no locks. Trainer ranks attach, publish and fetch tasks; engine ranks join, ask trainer ranks
for exports and report; the driver waits for them. Whoever waits gives a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

from rdt_core import tracing
from rdt_core.awaited_versions import AwaitedVersions
from rdt_core.errors import (
    ConfigError,
    CoordinatorLostError,
    ForgottenError,
    GroupInUseError,
    LeaseLostError,
    MissingTrainerRankError,
    NotPublishedError,
    ReleasedError,
    StaleVersionError,
    SupersededError,
    TopologyChangedError,
)
from rdt_core.known_trainer import KnownTrainer, ranks_behind, ranks_writing, topology_of
from rdt_core.leases import LeaseBook
from rdt_core.numbering import number_a_life
from rdt_core.timeouts import check_timeout
from rdt_core.words import NOTHING_SAID, LastWords, Outcome, TrainerTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

POLL_S = 2.0
"""How long a trainer rank's request for tasks is held open; it doubles as its sign of life."""

SILENT_S = 10.0
"""A trainer rank that has given no sign of life for this long counts as gone."""

MAX_HISTORY = 32
"""How many of a group's last syncs are kept; all but the last completed one without their rows by rank."""


class Coordinator:
    """State of one sync group. Every method may raise an :class:`RdtError`, which reaches the caller.

    Args:
        group: the group's name, for messages.
        clock: seconds, growing; every deadline is measured on it.
    """

    def __init__(self, group: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._group = group
        self._clock = clock
        self._awaited_versions = AwaitedVersions(clock, self._is_decided)
        self._leases = LeaseBook(clock)
        self._session = uuid.uuid4().hex
        self._life = uuid.uuid4().hex
        self._world_size = 0
        self._floor = 0
        self._trainers: dict[int, KnownTrainer] = {}
        self._engines: dict[tuple[str, int], dict[str, Any]] = {}
        self._prepared: dict[tuple[str, int], tuple[str, Outcome]] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._open_tasks: set[int] = set()
        self._numbers = number_a_life()
        self._history: deque[dict[str, Any]] = deque(maxlen=MAX_HISTORY)
        self._changed = asyncio.Condition()

    async def attach(
        self,
        rank: int,
        world_size: int,
        instance: str,
        manifest: bytes,
        last: LastWords = NOTHING_SAID,
    ) -> int:
        """A trainer rank offers its manifest. Returns the version that it must go beyond, 0 if none.

        A rank whose earlier process fell silent is replaced; one that is alive is not. A rank that this
        coordinator knows already only gives a sign of life.

        Args:
            rank: global rank on the trainer side.
            world_size: number of trainer ranks.
            instance: names the process.
            manifest: in its wire form.
            last: what a rank that introduces itself again, to a coordinator that was restarted, had said to
                the one before.
        """
        earlier: KnownTrainer | None = None
        while (known := self._trainers.get(rank)) is not None:
            if known.instance == instance:
                await self._hear(known, last.version)
                return known.version
            await self._wait_until_silent_or_alive(rank, known)
            earlier = known
            # Otherwise it has left, or somebody else has taken its place meanwhile.
            if self._trainers.get(rank) is known:
                break
        await self._settle_world_size(rank, world_size)
        if last.session and not self._trainers:
            self._session = last.session
        # Whatever an earlier process of this rank published, this one's memory does not hold it.
        version = last.version or (earlier.version if earlier else 0) or self._floor
        self._trainers[rank] = KnownTrainer(
            instance,
            manifest,
            self._clock(),
            version,
            awaits_publish=bool(last.version),
            is_writing=not last.version or last.is_writing,
        )
        await self._notify()
        return version

    async def _settle_world_size(self, rank: int, world_size: int) -> None:
        """Take over a new number of ranks, once those of the old number are gone."""
        while self._world_size not in (0, world_size):
            others = {number: other for number, other in self._trainers.items() if number != rank}
            for number, other in others.items():
                try:
                    await self._wait_until_silent_or_alive(number, other)
                except GroupInUseError:
                    raise ConfigError(
                        f"trainer rank {rank} says the group has {world_size} ranks, others said "
                        f"{self._world_size}. Attach every rank with the same world size."
                    ) from None
            if all(self._trainers.get(number) is other for number, other in others.items()):
                self._floor = max((t.version for t in self._trainers.values()), default=self._floor)
                self._trainers.clear()
                self._world_size = world_size
        self._world_size = world_size

    async def _wait_until_silent_or_alive(self, rank: int, known: KnownTrainer) -> None:
        """Until an earlier process of a rank has left or counts as gone; raises once it says something."""
        seen = known.last_seen

        def is_gone() -> bool:
            return self._trainers.get(rank) is not known or self._is_silent(known)

        while not is_gone():
            if known.last_seen > seen:
                raise GroupInUseError(self._group, rank)
            await self._wait(lambda: known.last_seen > seen or is_gone(), POLL_S)

    async def next_tasks(self, rank: int, instance: str, version: int = 0) -> list[TrainerTask]:
        """Tasks for a trainer rank; held open for ``POLL_S``, or until it leaves, then empty.

        Called in a loop by the rank's service thread, also as its sign of life. ``version`` is the last it
        has published, in case that was told to a coordinator which is gone.
        """
        trainer = self._trainer(rank, instance)
        await self._hear(trainer, version)
        # The end of the wait is no sign of life: the rank may have died while it was held open.
        await self._wait(lambda: bool(trainer.tasks) or trainer.is_leaving, POLL_S)
        tasks = list(trainer.tasks)
        trainer.tasks.clear()
        return tasks

    async def end_tasks(self, rank: int, instance: str) -> None:
        """A trainer rank is about to leave: whatever is held open for its tasks is answered at once."""
        self._trainer(rank, instance).is_leaving = True
        await self._notify()

    async def _hear(self, trainer: KnownTrainer, version: int) -> None:
        """A sign of life, with the rank's last version. Never takes back that a rank began to write."""
        trainer.last_seen = self._clock()
        if version > trainer.version:
            trainer.version, trainer.awaits_publish, trainer.is_writing = version, True, False
        await self._notify()

    async def answer(self, number: int, outcome: Outcome) -> None:
        """A trainer rank's answer to a task; dropped when nobody waits for it any more."""
        if number in self._open_tasks:
            self._outcomes[number] = outcome
            await self._notify()

    async def publish(self, rank: int, instance: str, version: int, arena_bytes: int = 0) -> None:
        """A trainer rank's memory now holds ``version``; beside its parameters it holds ``arena_bytes``.

        A sign of life sent after this call may arrive before it and tell the version first.
        """
        trainer = self._trainer(rank, instance)
        is_told = trainer.awaits_publish and version == trainer.version
        if version <= trainer.version and not is_told:
            raise StaleVersionError(version, trainer.version, "published")
        trainer.version, trainer.awaits_publish, trainer.is_writing = version, False, False
        trainer.arena_bytes = arena_bytes
        trainer.last_seen = self._clock()
        await self._notify()

    async def release(self, rank: int, instance: str, timeout_s: float) -> list[tuple[str, int]]:
        """A trainer rank is about to write. Returns the readers whose leases were revoked, mostly none.

        From now on nobody begins to read what this rank last published. Whoever reads already has
        ``timeout_s`` seconds to end; then the leases are revoked, and those reads end with an error.
        """
        trainer = self._trainer(rank, instance)
        # The end of the wait is no sign of life: the rank may have died meanwhile.
        trainer.is_writing, trainer.last_seen = True, self._clock()
        await self._notify()
        await self._wait(lambda: not self._leases.active(), timeout_s)
        return [lease.reader for lease in self._leases.revoke()]

    async def detach(self, rank: int, instance: str) -> bool:
        """A trainer rank leaves. Returns whether the group is now empty of trainers."""
        trainer = self._trainers.get(rank)
        if trainer is not None and trainer.instance == instance:
            del self._trainers[rank]
            await self._notify()
        return not self._live_ranks()

    async def session(self) -> str:
        """Identifies this life of the group: versions are compared within one session only."""
        return self._session

    async def manifests(self, timeout_s: float) -> list[bytes]:
        """Every trainer rank's manifest, waiting for ranks that have not attached yet."""
        started = self._clock()
        complete = await self._wait(lambda: self._world_size > 0 and not self._missing(), timeout_s)
        if not complete:
            waited_s = self._clock() - started
            raise MissingTrainerRankError(self._group, self._missing(), self._world_size, waited_s)
        return [trainer.manifest for _, trainer in sorted(self._trainers.items())]

    async def ask(self, kind: str, payloads: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        """Give tasks to trainer ranks and return their answers by rank.

        Ranks that a restarted coordinator does not know yet have the time to introduce themselves.
        """
        started = self._clock()
        await self._wait(lambda: not self._awaited(payloads), min(timeout_s, SILENT_S))
        gone = tuple(sorted(set(payloads) - self._live_ranks()))
        if gone:
            raise MissingTrainerRankError(self._group, gone, self._world_size, self._clock() - started)
        numbers = {rank: next(self._numbers) for rank in payloads}
        self._open_tasks.update(numbers.values())
        traceparent = tracing.traceparent()
        for rank, payload in payloads.items():
            self._trainers[rank].tasks.append(TrainerTask(numbers[rank], kind, payload, traceparent))
        await self._notify()

        def unanswered() -> set[int]:
            return {rank for rank, number in numbers.items() if number not in self._outcomes}

        left_s = started + timeout_s - self._clock()
        await self._wait(lambda: not unanswered() or bool(unanswered() - self._live_ranks()), left_s)
        late = tuple(sorted(unanswered()))
        self._open_tasks.difference_update(numbers.values())
        outcomes = {rank: self._outcomes.pop(n) for rank, n in numbers.items() if n in self._outcomes}
        if late:
            raise MissingTrainerRankError(self._group, late, self._world_size, self._clock() - started)
        for outcome in outcomes.values():
            if outcome.error is not None:
                raise outcome.error
        return {rank: outcome.value for rank, outcome in outcomes.items()}

    async def topology(self) -> str:
        """Identifies the trainer processes; another one when any was replaced."""
        return topology_of(self._trainers)

    async def wait_published(self, version: int, timeout_s: float) -> tuple[str, int]:
        """Until every trainer rank has published exactly ``version``.

        Returns:
            What names this life of the coordinator, for :meth:`wait_prepared`, and the bytes of all arenas.
        """
        timeout_s = check_timeout(timeout_s)
        if await self._awaited_versions.wait(version, lambda: self._check(version), timeout_s) is None:
            self._check(version, waited_s=timeout_s)
        await self._tell_trace(version)
        return self._life, sum(trainer.arena_bytes for trainer in self._trainers.values())

    async def await_published(self, version: int, timeout_s: float) -> bool:
        """Whether a read of ``version`` would be answered by now, after ``timeout_s`` at the latest.

        Called by an engine rank that was asked to read before the version was there. True says nothing of the
        version but that waiting is over: :meth:`begin_read` and :meth:`check_version` say whether it is held.
        """
        return bool(await self._awaited_versions.wait(version, lambda: True, check_timeout(timeout_s)))

    async def _tell_trace(self, version: int) -> None:
        """Tell trainer ranks to which trace their publish of ``version`` belongs, if there is one."""
        traceparent = tracing.traceparent()
        if traceparent:
            for trainer in self._trainers.values():
                trainer.tasks.append(TrainerTask(next(self._numbers), "trace", version, traceparent))
            await self._notify()

    async def call(self, method: str, args: Sequence[object], traceparent: str) -> Any:
        """Another method by its name, in a span of its caller's trace if there is one. Called by channels."""
        with tracing.continued(f"rdt.coordinator.{method}", traceparent, group=self._group):
            return await getattr(self, method)(*args)

    async def check_version(self, version: int, topology: str = "", wait_s: float = 0.0) -> str:
        """Whether every trainer rank holds ``version``, in the moment in which it is published.

        Args:
            version: as published.
            topology: that the trainer processes must have; any if empty.
            wait_s: to wait for it, at most.

        Returns:
            What names this life of the coordinator; nothing where waiting is not over.
        """
        if not wait_s:
            return self._check(version, topology)
        check = functools.partial(self._check, version, topology)
        return await self._awaited_versions.wait(version, check, check_timeout(wait_s)) or ""

    def _check(self, version: int, topology: str = "", waited_s: float = 0.0) -> str:
        ahead = max((trainer.version for trainer in self._trainers.values()), default=0)
        if ahead > version:
            raise SupersededError(version, ahead)
        behind = ranks_behind(self._trainers, self._world_size, version)
        if behind:
            raise NotPublishedError(version, behind, waited_s)
        released = ranks_writing(self._trainers, version)
        if released:
            raise ReleasedError(version, released)
        if topology not in ("", topology_of(self._trainers)):
            raise TopologyChangedError(self._group, "another process has taken the place of a rank")
        return self._life

    async def begin_read(
        self, engine: str, rank: int, version: int, topology: str, timeout_s: float, wait_s: float = 0.0
    ) -> int:
        """An engine rank begins to read: a lease, which ends after ``timeout_s`` seconds at the latest.

        With ``wait_s`` it is taken when the version is published, before a trainer rank can take that back.

        Returns:
            The lease's number, for :meth:`end_read`; 0 where waiting is not over after ``wait_s`` seconds.
        """
        timeout_s = check_timeout(timeout_s)

        def begin() -> int:
            if (engine, rank) not in self._engines:
                raise ForgottenError(self._group, f"rank {rank} of engine {engine}")
            self._check(version, topology)
            return self._leases.take((engine, rank), version, timeout_s)

        if not wait_s:
            return begin()
        return await self._awaited_versions.wait(version, begin, check_timeout(wait_s)) or 0

    async def end_read(self, lease: int, version: int) -> None:
        """An engine rank has read everything; raises unless the version was there all the time.

        A trainer that waits to write does not spoil a read whose lease held.
        """
        held = self._leases.give_back(lease)
        await self._notify()
        ahead = max((trainer.version for trainer in self._trainers.values()), default=0)
        if not held or ahead > version:
            # It was published: a rank that does not hold it now has left since, and the lease says more.
            with contextlib.suppress(NotPublishedError):
                self._check(version)
            raise LeaseLostError(version)

    async def drop_lease(self, lease: int) -> None:
        """An engine rank's read failed; nobody need wait for it."""
        self._leases.give_back(lease)
        await self._notify()

    async def join(self, engine: str, rank: int, info: dict[str, Any]) -> None:
        """An engine rank is connected. ``info`` is shown by :meth:`status`."""
        self._engines[engine, rank] = info
        self._prepared.pop((engine, rank), None)
        await self._notify()

    async def leave(self, engine: str, rank: int) -> None:
        """An engine rank disconnects; trainer ranks drop what they export to it."""
        self._engines.pop((engine, rank), None)
        self._prepared.pop((engine, rank), None)
        for trainer in self._trainers.values():
            trainer.tasks.append(
                TrainerTask(next(self._numbers), "drop", {"reader": reader_name(engine, rank)})
            )
        await self._notify()

    async def report_prepared(self, engine: str, rank: int, attempt: str, outcome: Outcome) -> None:
        """How an engine rank's read ended. ``attempt`` is the driver's name for the try."""
        self._prepared[engine, rank] = (attempt, outcome)
        await self._notify()

    async def wait_prepared(
        self, attempt: str, members: Sequence[tuple[str, int]], life: str, timeout_s: float
    ) -> dict[tuple[str, int], Outcome]:
        """The outcomes of members, once all have ended or one has failed; what there is when time is up.

        ``life`` is the coordinator's when the attempt began: what was reported to an earlier one is lost.
        """
        if life != self._life:
            raise CoordinatorLostError(self._group, "it was restarted in the middle of a sync")

        def outcomes() -> dict[tuple[str, int], Outcome]:
            found = ((member, self._prepared.get(member)) for member in members)
            return {member: entry[1] for member, entry in found if entry and entry[0] == attempt}

        def is_decided() -> bool:
            ended = outcomes()
            return len(ended) == len(members) or any(outcome.error for outcome in ended.values())

        await self._wait(is_decided, timeout_s)
        return outcomes()

    async def record(self, sync: dict[str, Any]) -> None:
        """Keep how a sync ended, as plain values; see :class:`rdt_core.history.CoordinatorHistory`."""
        if "ranks" in sync:
            for earlier in self._history:
                earlier.pop("ranks", None)
        self._history.append(sync)

    async def history(self) -> list[dict[str, Any]]:
        """The group's last syncs, oldest first; only the last completed one has its rows by rank."""
        return list(self._history)

    async def status(self) -> dict[str, Any]:
        """Plain values about trainers and engines, for people and tools."""
        now = self._clock()
        return {
            "group": self._group,
            "life": self._life,
            "world_size": self._world_size,
            "trainers": {
                rank: {**trainer.describe(now), "alive": not self._is_silent(trainer)}
                for rank, trainer in sorted(self._trainers.items())
            },
            "leases": [
                {"engine": lease.reader[0], "rank": lease.reader[1], "version": lease.version}
                for lease in self._leases.active()
            ],
            "engines": [
                {"engine": engine, "rank": rank, **info}
                for (engine, rank), info in sorted(self._engines.items())
            ],
        }

    def _trainer(self, rank: int, instance: str) -> KnownTrainer:
        trainer = self._trainers.get(rank)
        if trainer is None:
            raise ForgottenError(self._group, f"trainer rank {rank}")
        if trainer.instance != instance:
            raise GroupInUseError(self._group, rank)
        return trainer

    def _is_silent(self, trainer: KnownTrainer) -> bool:
        return self._clock() - trainer.last_seen > SILENT_S

    def _live_ranks(self) -> set[int]:
        return {rank for rank, trainer in self._trainers.items() if not self._is_silent(trainer)}

    def _missing(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self._world_size)) - self._live_ranks()))

    def _awaited(self, ranks: Iterable[int]) -> set[int]:
        """Those that are part of the group, as far as it is known, and have not introduced themselves."""
        return {
            r for r in ranks if r not in self._trainers and (not self._world_size or r < self._world_size)
        }

    def _is_decided(self, version: int) -> bool:
        return not ranks_behind(self._trainers, self._world_size, version) or bool(
            ranks_writing(self._trainers, version)
        )

    async def _notify(self) -> None:
        self._awaited_versions.settle()
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, is_true: Callable[[], bool], timeout_s: float) -> bool:
        """Until the condition holds or time runs out; looks again at least every second, for silence."""
        deadline = self._clock() + check_timeout(timeout_s)
        async with self._changed:
            while not is_true():
                left = deadline - self._clock()
                if left <= 0:
                    return False
                try:
                    await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
                except TimeoutError:
                    continue
        return True


def reader_name(engine: str, rank: int) -> str:
    """Under which trainer ranks keep an engine rank's exports."""
    return f"{engine}#{rank}"
