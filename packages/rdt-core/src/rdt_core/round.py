"""One attempt to bring engines to a version: everybody reads, then everybody commits, or nobody does."""

from __future__ import annotations

import concurrent.futures
import logging
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdt_core.errors import ConfigError, DeadlineError, EngineUnreachableError, RdtError, UpdateFailedError
from rdt_core.fan_out import circles_to_wire
from rdt_core.member import MARGIN_S
from rdt_core.mode import AUTO, MODES
from rdt_core.progress import trace_context

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

    from rdt_core.client import CoordinatorClient
    from rdt_core.fan_out import Circle, Neighbour
    from rdt_core.member import Member
    from rdt_core.words import Outcome

logger = logging.getLogger(__name__)

ALL_OR_NONE = "group"
EACH_ALONE = "engine"

_ABORT_TIMEOUT_S = 5.0

_ANNOUNCE_TIMEOUT_S = 10.0
"""An announcement that takes longer than this, which is more than it can, is not waited for."""

_LOOK_S = 2.0
"""How often a driver that waits for reads looks whether the engines that read are still there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOptions:
    """What an update was asked for; see :meth:`rdt_core.sync.WeightSync.update`.

    Raises:
        ConfigError: a value is not one of those that there are.
    """

    mode: str | None = None
    verify: str | None = None
    kv_cache: str = "recompute"
    commit_policy: str = ALL_OR_NONE
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("mode", self.mode, (None, *(mode for mode in MODES if mode != AUTO))),
            ("verify", self.verify, (None, "digest")),
            ("kv_cache", self.kv_cache, ("recompute", "keep")),
            ("commit_policy", self.commit_policy, (ALL_OR_NONE, EACH_ALONE)),
        ):
            if value not in allowed:
                known = " or ".join(repr(one) for one in allowed if one is not None)
                raise ConfigError(f"{name} {value!r} is not {known}. Leave it out for the default.")
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be seconds, more than 0, got {self.timeout_s!r}.")

    def for_reading(self) -> dict[str, Any]:
        """The part of a control request that says how to read."""
        asked = {"timeout_s": self.timeout_s, **trace_context()}
        return asked if self.verify is None else {**asked, "verify": self.verify}


class Round:
    """One attempt at one version. Used by one driver thread, once.

    Args:
        client: of the group's coordinator.
        pool: threads for talking to engines.
        members: that are to take the version.
        version: published by every trainer rank.
        options: how.
        circles: of engine ranks that read together, see :mod:`rdt_core.fan_out`.
        connect: has a member join that must before it can read: one that reads in another mode, or that an
            earlier call left outside. By default all have.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        pool: ThreadPoolExecutor,
        members: Sequence[Member],
        version: int,
        options: UpdateOptions,
        connect: Callable[[Member], None] = lambda _: None,
        circles: Mapping[Neighbour, Circle] | None = None,
    ) -> None:
        self._connect, self._circles = connect, circles or {}
        self._turn = time.time_ns()
        self._client, self._pool, self._version, self._options = client, pool, version, options
        self._members = list(members)
        self._attempt = f"{version}:{uuid.uuid4().hex}"
        self._asked: dict[Member, Future[UpdateFailedError | None]] = {}
        self._announcing: list[Future[None]] = []
        self.failures: list[UpdateFailedError] = []

    def ask_ahead(self) -> None:
        """Ask members to read before the version is published; returns at once.

        Their ranks wait for the publication themselves, so that it finds them ready. An engine that cannot,
        or must connect in another mode first, is asked by :meth:`prepare`.
        """
        # Here, where the trace of the sync is known: an announcement is as long as its commit.
        mode, commit = self._options.mode, self._for_commit()
        for member in self._members:
            if member.awaits_publication and (mode is None or member.reads_in(mode)):
                payload = {**self._for_reading(member), "awaits_publication": True}
                self._asked[member] = self._pool.submit(self._ask, member, payload, commit)

    def prepare(self, life: str) -> list[Member]:
        """Have every rank of every member read. Blocks until all have, or one has failed.

        Args:
            life: of the coordinator that said that the version is published.

        Returns:
            The members that may commit; with ``commit_policy="group"`` all of them.

        Raises:
            UpdateFailedError: a rank failed; with ``commit_policy="engine"``, in every engine. Whoever had
                begun was told to forget it.
            CoordinatorLostError, DeadlineError: the coordinator does not answer.
        """
        try:
            failed = self._ask_others()
            if not (failed and self._is_all_or_none):
                reading = [member for member in self._members if member not in failed]
                others = [member for member in reading if member not in self._asked]
                self._announce_commit(others, self._for_commit())
                failed |= self._wait_for_reads(life, reading)
            return self._sift(failed)
        except RdtError:
            self.abort(self._members)
            raise

    def commit(self, members: Sequence[Member]) -> dict[str, dict[str, Any]]:
        """Have members flip, all at once. Blocks until all have answered.

        Returns:
            By URL, what each engine answered.

        Raises:
            UpdateFailedError: an engine did not commit; with ``commit_policy="engine"``, none did. Those that
                did serve the version.
        """
        answers: dict[str, dict[str, Any]] = {}
        payload = self._for_commit()
        concurrent.futures.wait(self._announcing, _ANNOUNCE_TIMEOUT_S)

        def commit(member: Member) -> None:
            timeout_s = self._options.timeout_s + MARGIN_S
            answers[member.url] = member.call("commit", payload, timeout_s)
            member.version = self._version
            member.learn(answers[member.url]["ranks"])

        failed = self._on_all("commit", members, commit)
        self.abort(list(failed))
        self.failures += failed.values()
        if failed and (self._is_all_or_none or not answers):
            raise _first(self.failures)
        return answers

    def give_up(self) -> None:
        """Abort those who were asked ahead: the version will not be published. Never raises."""
        # So that no abort overtakes what it is to end.
        concurrent.futures.wait(self._asked.values(), _ABORT_TIMEOUT_S)
        self.abort(list(self._asked))

    def abort(self, members: Sequence[Member]) -> None:
        """Tell members to forget what they read, as far as they still listen. Never raises."""
        concurrent.futures.wait(self._announcing, _ANNOUNCE_TIMEOUT_S)

        def abort(member: Member) -> None:
            member.retract("commit")
            member.call("abort", {}, _ABORT_TIMEOUT_S)

        for member, error in self._on_all("abort", members, abort).items():
            logger.warning("engine %s did not abort: %s", member.url, error.detail)

    def _announce_commit(self, members: Sequence[Member], payload: Mapping[str, Any]) -> None:
        """Have engines route the request that they get when all have read, meanwhile; returns at once.

        Called by any thread.
        """
        self._announcing += [self._pool.submit(member.announce, "commit", payload) for member in members]

    def _for_commit(self) -> dict[str, Any]:
        return {
            "version": self._version,
            "kv_cache": self._options.kv_cache,
            **self._options.for_reading(),
        }

    def _for_reading(self, member: Member) -> dict[str, Any]:
        asked = {"version": self._version, "attempt": self._attempt, **self._options.for_reading()}
        circles = circles_to_wire(self._circles, member.url)
        return {**asked, "circles": circles, "turn": self._turn} if circles else asked

    def _ask_others(self) -> dict[Member, UpdateFailedError]:
        """Ask those who were not asked ahead, and wait until all have answered; the failures by member."""
        others = [member for member in self._members if member not in self._asked]

        def prepare(member: Member) -> None:
            self._connect(member)
            member.call("prepare", self._for_reading(member), self._options.timeout_s)

        failed = self._on_all("prepare", others, prepare)
        answers = {member: answer.result() for member, answer in self._asked.items()}
        return failed | {member: error for member, error in answers.items() if error is not None}

    def _ask(
        self, member: Member, payload: Mapping[str, Any], commit: Mapping[str, Any]
    ) -> UpdateFailedError | None:
        try:
            member.call("prepare", payload, self._options.timeout_s)
        except RdtError as error:
            return self._failed("prepare", member, error.failed_rank, error)
        # Mostly before the version is there, so that nobody waits for it afterwards.
        self._announce_commit([member], commit)
        return None

    @property
    def _is_all_or_none(self) -> bool:
        return self._options.commit_policy == ALL_OR_NONE

    def _sift(self, failed: Mapping[Member, UpdateFailedError]) -> list[Member]:
        self.failures += failed.values()
        ready = [member for member in self._members if member not in failed]
        if failed and (self._is_all_or_none or not ready):
            raise _first(self.failures)
        self.abort(list(failed))
        return ready

    def _wait_for_reads(self, life: str, members: Sequence[Member]) -> dict[Member, UpdateFailedError]:
        """Until every rank has read, or one failed where that decides; the first failure by member."""
        deadline = time.monotonic() + self._options.timeout_s + MARGIN_S
        waiting = list(members)
        failed: dict[Member, UpdateFailedError] = {}
        while waiting and not (failed and self._is_all_or_none):
            left = deadline - time.monotonic()
            ids = [rank_id for member in waiting for rank_id in member.rank_ids]
            left_s = max(0.0, min(left, _LOOK_S))
            outcomes = self._client.wait_prepared(self._attempt, ids, life, left_s)
            for member in list(waiting):
                error = self._judge(member, outcomes, is_late=left <= 0)
                if error is not None:
                    failed[member] = error
                if error is not None or all(rank_id in outcomes for rank_id in member.rank_ids):
                    waiting.remove(member)
        return failed

    def _judge(
        self, member: Member, outcomes: Mapping[tuple[str, int], Outcome], *, is_late: bool
    ) -> UpdateFailedError | None:
        """Why a member's read has failed; None when it has not, or not yet."""
        for url, rank in member.rank_ids:
            outcome = outcomes.get((url, rank))
            if outcome is not None and outcome.error is not None:
                return self._failed("prepare", member, rank, outcome.error)
        silent = [rank for url, rank in member.rank_ids if (url, rank) not in outcomes]
        if silent and is_late:
            what = f"the read of version {self._version}"
            late = DeadlineError(what, self._options.timeout_s, "Look into that engine's log.")
            return self._failed("prepare", member, silent[0], late)
        if silent and not member.is_listening():
            gone = EngineUnreachableError(member.url, "it stopped listening while it read")
            return self._failed("prepare", member, -1, gone)
        return None

    def _on_all(
        self, phase: str, members: Sequence[Member], act: Callable[[Member], object]
    ) -> dict[Member, UpdateFailedError]:
        """Act on members at once and wait for all; the failures by member."""
        failed: dict[Member, UpdateFailedError] = {}

        def guarded(member: Member) -> None:
            try:
                act(member)
            except RdtError as error:
                failed[member] = self._failed(phase, member, error.failed_rank, error)

        list(self._pool.map(guarded, members) if len(members) > 1 else map(guarded, members))
        return failed

    def _failed(self, phase: str, member: Member, rank: int, error: RdtError) -> UpdateFailedError:
        failure = UpdateFailedError(self._version, phase, member.url, rank, str(error))
        failure.__cause__ = error
        return failure


def _first(failures: Sequence[UpdateFailedError]) -> UpdateFailedError:
    return min(failures, key=lambda failure: (failure.engine, failure.rank))
