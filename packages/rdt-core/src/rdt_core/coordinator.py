"""The one place where a sync group's metadata meets. No weight byte passes through it.

One named Ray actor a group runs this class; every method is a coroutine on its single event loop, so state
changes need no locks. Trainer ranks attach, publish and fetch tasks; engine ranks join, ask trainer ranks
for exports and report; the driver waits for them. Whoever waits gives a deadline.
"""

from __future__ import annotations

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
from rdt_core.leases import LeaseBook
from rdt_core.numbering import number_a_life
from rdt_core.questions import OpenQuestions, Question
from rdt_core.read_outcomes import ReadOutcomes
from rdt_core.roster import SILENT_S, KnownTrainer, Roster
from rdt_core.signals import Signal
from rdt_core.timeouts import check_timeout
from rdt_core.words import NOTHING_SAID, LastWords, Outcome, TrainerTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

POLL_S = 2.0
"""How long a trainer rank's request for tasks is held open; it doubles as its sign of life."""

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
        self._floor = 0
        self._trainers = Roster(clock)
        self._engines: dict[tuple[str, int], dict[str, Any]] = {}
        self._reads = ReadOutcomes(clock)
        self._questions = OpenQuestions()
        self._numbers = number_a_life()
        self._history: deque[dict[str, Any]] = deque(maxlen=MAX_HISTORY)

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
        _check_rank(rank, world_size)
        earlier: KnownTrainer | None = None
        while (known := self._trainers.get(rank)) is not None:
            if known.instance == instance:
                self._hear(known, last.version)
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
        trainer = KnownTrainer(
            instance=instance,
            manifest=manifest,
            last_seen=self._clock(),
            changed=Signal(self._clock),
            version=version,
            is_writing=not last.version or last.is_writing,
            awaits_publish=bool(last.version),
        )
        self._trainers.enter(rank, trainer)
        self._tell_of_ranks()
        return version

    async def _settle_world_size(self, rank: int, world_size: int) -> None:
        """Take over a new number of ranks, once those of the old number are gone."""
        while self._trainers.world_size not in (0, world_size):
            others = {number: other for number, other in self._trainers if number != rank}
            for number, other in others.items():
                try:
                    await self._wait_until_silent_or_alive(number, other)
                except GroupInUseError:
                    raise ConfigError(
                        f"trainer rank {rank} says the group has {world_size} ranks, others said "
                        f"{self._trainers.world_size}. Attach every rank with the same world size."
                    ) from None
            if all(self._trainers.get(number) is other for number, other in others.items()):
                self._floor = self._trainers.newest or self._floor
                self._trainers.clear()
                self._trainers.world_size = world_size
        self._trainers.world_size = world_size

    async def _wait_until_silent_or_alive(self, rank: int, known: KnownTrainer) -> None:
        """Until an earlier process of a rank has left or counts as gone; raises once it says something."""
        seen = known.last_seen

        def is_gone() -> bool:
            return self._trainers.get(rank) is not known or self._trainers.is_silent(known)

        while not is_gone():
            if known.last_seen > seen:
                raise GroupInUseError(self._group, rank)
            await known.changed.wait(lambda: known.last_seen > seen or is_gone(), POLL_S)

    async def next_tasks(self, rank: int, instance: str, version: int = 0) -> list[TrainerTask]:
        """Tasks for a trainer rank; held open for ``POLL_S``, or until it leaves, then empty.

        Called in a loop by the rank's service thread, also as its sign of life. ``version`` is the last it
        has published, in case that was told to a coordinator which is gone.
        """
        trainer = self._trainer(rank, instance)
        self._hear(trainer, version)
        # The end of the wait is no sign of life: the rank may have died while it was held open.
        await trainer.changed.wait(lambda: bool(trainer.tasks) or trainer.is_leaving, POLL_S)
        tasks = list(trainer.tasks)
        trainer.tasks.clear()
        return tasks

    async def end_tasks(self, rank: int, instance: str) -> None:
        """A trainer rank is about to leave: whatever is held open for its tasks is answered at once."""
        trainer = self._trainer(rank, instance)
        trainer.is_leaving = True
        trainer.changed.wake()

    def _hear(self, trainer: KnownTrainer, version: int) -> None:
        """A sign of life, with the rank's last version. Never takes back that a rank began to write."""
        self._trainers.hear(trainer)
        if version > trainer.version:
            trainer.awaits_publish = True
            self._trainers.note(trainer, version, is_writing=False)
            self._awaited_versions.settle()

    async def answer(self, number: int, outcome: Outcome) -> None:
        """A trainer rank's answer to a task; dropped when nobody waits for it any more."""
        self._questions.answer(number, outcome)

    async def publish(self, rank: int, instance: str, version: int, arena_bytes: int = 0) -> None:
        """A trainer rank's memory now holds ``version``; beside its parameters it holds ``arena_bytes``.

        A sign of life sent after this call may arrive before it and tell the version first.
        """
        trainer = self._trainer(rank, instance)
        is_told = trainer.awaits_publish and version == trainer.version
        if version <= trainer.version and not is_told:
            raise StaleVersionError(version, trainer.version, "published")
        self._trainers.note(trainer, version, is_writing=False)
        trainer.awaits_publish, trainer.arena_bytes = False, arena_bytes
        trainer.last_seen = self._clock()
        self._awaited_versions.settle()

    async def release(self, rank: int, instance: str, timeout_s: float) -> list[tuple[str, int]]:
        """A trainer rank is about to write. Returns the readers whose leases were revoked, mostly none.

        From now on nobody begins to read what this rank last published. Whoever reads already has
        ``timeout_s`` seconds to end; then the leases are revoked, and those reads end with an error.
        """
        trainer = self._trainer(rank, instance)
        # The end of the wait is no sign of life: the rank may have died meanwhile.
        trainer.last_seen = self._clock()
        self._trainers.note(trainer, trainer.version, is_writing=True)
        self._awaited_versions.settle()
        await self._leases.wait_until_none(timeout_s)
        return [lease.reader for lease in self._leases.revoke()]

    async def detach(self, rank: int, instance: str) -> bool:
        """A trainer rank leaves. Returns whether the group is now empty of trainers."""
        trainer = self._trainers.get(rank)
        if trainer is not None and trainer.instance == instance:
            self._trainers.drop(rank)
            self._tell_of_ranks()
        return not self._has_live_ranks()

    async def session(self) -> str:
        """Identifies this life of the group: versions are compared within one session only."""
        return self._session

    async def manifests(self, timeout_s: float) -> list[bytes]:
        """Every trainer rank's manifest, waiting for ranks that have not attached yet."""
        started = self._clock()
        if not await self._trainers.changed.wait(self._trainers.are_complete, timeout_s):
            raise self._missing(self._trainers.missing(), started)
        return [trainer.manifest for _, trainer in self._trainers]

    async def ask(self, kind: str, payloads: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        """Give tasks to trainer ranks and return their answers by rank.

        Ranks that a restarted coordinator does not know yet have the time to introduce themselves.
        """
        started = self._clock()
        ranks = self._trainers
        await ranks.changed.wait(lambda: not self._awaited(payloads), min(timeout_s, SILENT_S))
        gone = tuple(sorted(rank for rank in payloads if not ranks.is_alive(rank)))
        if gone:
            raise self._missing(gone, started)
        numbers = {rank: next(self._numbers) for rank in payloads}
        question = Question({number: rank for rank, number in numbers.items()}, self._clock)
        traceparent = tracing.traceparent()

        def is_decided() -> bool:
            return not all(map(ranks.is_alive, question.unanswered.values())) or not question.unanswered

        self._questions.open(question)
        try:
            for rank, payload in payloads.items():
                ranks[rank].ask(TrainerTask(numbers[rank], kind, payload, traceparent))
            await question.changed.wait(is_decided, started + timeout_s - self._clock())
        finally:
            self._questions.close(question)
        if question.unanswered:
            raise self._missing(sorted(question.unanswered.values()), started)
        for outcome in question.outcomes.values():
            if outcome.error is not None:
                raise outcome.error
        return {rank: question.outcomes[rank].value for rank in payloads}

    async def topology(self) -> str:
        """Identifies the trainer processes; another one when any was replaced."""
        return self._trainers.topology

    async def wait_published(self, version: int, timeout_s: float) -> tuple[str, int]:
        """Until every trainer rank has published exactly ``version``.

        Returns:
            What names this life of the coordinator, for :meth:`wait_prepared`, and the bytes of all arenas.
        """
        timeout_s = check_timeout(timeout_s)
        if await self._awaited_versions.wait(version, lambda: self._check(version), timeout_s) is None:
            self._check(version, waited_s=timeout_s)
        self._tell_trace(version)
        return self._life, sum(trainer.arena_bytes for _, trainer in self._trainers)

    async def await_published(self, version: int, timeout_s: float) -> bool:
        """Whether a read of ``version`` would be answered by now, after ``timeout_s`` at the latest.

        Called by an engine rank that was asked to read before the version was there. True says nothing of the
        version but that waiting is over: :meth:`begin_read` and :meth:`check_version` say whether it is held.
        """
        return bool(await self._awaited_versions.wait(version, lambda: True, check_timeout(timeout_s)))

    def _tell_trace(self, version: int) -> None:
        """Tell trainer ranks to which trace their publish of ``version`` belongs, if there is one."""
        traceparent = tracing.traceparent()
        if traceparent:
            for _, trainer in self._trainers:
                trainer.ask(TrainerTask(next(self._numbers), "trace", version, traceparent))

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
        if self._trainers.newest > version:
            raise SupersededError(version, self._trainers.newest)
        if not self._trainers.have_published(version):
            raise NotPublishedError(version, self._trainers.ranks_behind(version), waited_s)
        if self._trainers.are_writing(version):
            raise ReleasedError(version, self._trainers.ranks_writing(version))
        if topology not in ("", self._trainers.topology):
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
        if not held or self._trainers.newest > version:
            # It was published: a rank that does not hold it now has left since, and the lease says more.
            with contextlib.suppress(NotPublishedError):
                self._check(version)
            raise LeaseLostError(version)

    async def drop_lease(self, lease: int) -> None:
        """An engine rank's read failed; nobody need wait for it."""
        self._leases.give_back(lease)

    async def join(self, engine: str, rank: int, info: dict[str, Any]) -> None:
        """An engine rank is connected. ``info`` is shown by :meth:`status`."""
        self._engines[engine, rank] = info
        self._reads.forget((engine, rank))

    async def leave(self, engine: str, rank: int) -> None:
        """An engine rank disconnects; trainer ranks drop what they export to it."""
        self._engines.pop((engine, rank), None)
        self._reads.forget((engine, rank))
        for _, trainer in self._trainers:
            trainer.ask(TrainerTask(next(self._numbers), "drop", {"reader": reader_name(engine, rank)}))

    async def report_prepared(self, engine: str, rank: int, attempt: str, outcome: Outcome) -> None:
        """How an engine rank's read ended. ``attempt`` is the driver's name for the try."""
        self._reads.note((engine, rank), attempt, outcome)

    async def wait_prepared(
        self, attempt: str, members: Sequence[tuple[str, int]], life: str, timeout_s: float
    ) -> dict[tuple[str, int], Outcome]:
        """The outcomes of members, once all have ended or one has failed; what there is when time is up.

        ``life`` is the coordinator's when the attempt began: what was reported to an earlier one is lost.
        """
        if life != self._life:
            raise CoordinatorLostError(self._group, "it was restarted in the middle of a sync")

        return await self._reads.wait(attempt, members, timeout_s)

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
            "world_size": self._trainers.world_size,
            "trainers": {
                rank: {**trainer.describe(now), "alive": not self._trainers.is_silent(trainer)}
                for rank, trainer in self._trainers
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

    def _has_live_ranks(self) -> bool:
        return not all(self._trainers.is_silent(trainer) for _, trainer in self._trainers)

    def _missing(self, ranks: Iterable[int], since: float) -> MissingTrainerRankError:
        waited_s = self._clock() - since
        return MissingTrainerRankError(self._group, tuple(ranks), self._trainers.world_size, waited_s)

    def _awaited(self, ranks: Iterable[int]) -> set[int]:
        """Those that are part of the group, as far as it is known, and have not introduced themselves."""
        world_size = self._trainers.world_size
        return {r for r in ranks if r not in self._trainers and (not world_size or r < world_size)}

    def _is_decided(self, version: int) -> bool:
        return self._trainers.have_published(version) or self._trainers.are_writing(version)

    def _tell_of_ranks(self) -> None:
        """A rank has come or gone."""
        self._questions.look_again()
        self._awaited_versions.settle()


def _check_rank(rank: int, world_size: int) -> None:
    """A rank that a group of this size has.

    Raises:
        ConfigError: it has not.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"trainer rank {rank} is none of a group of {world_size}. Attach ranks from 0 on.")


def reader_name(engine: str, rank: int) -> str:
    """Under which trainer ranks keep an engine rank's exports."""
    return f"{engine}#{rank}"
