"""A newcomer's way to the version that the others serve: from the trainers, or from one that lends it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdt_core.errors import RdtError
from rdt_core.progress import Progress
from rdt_core.round import Round, UpdateOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from rdt_core.client import CoordinatorClient
    from rdt_core.member import Member
    from rdt_core.report import SyncReport

logger = logging.getLogger(__name__)

MAX_LENDERS = 2
"""How many engines are asked in turn before a newcomer waits for the trainers' next version."""

_CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where a newcomer may connect to.

    Args:
        lender: an engine that serves the version; None for the trainers.
        has_version: whether the current version can be read there now.
    """

    lender: Member | None
    has_version: bool

    def __str__(self) -> str:
        return f"engine {self.lender.url}" if self.lender else "the trainers"


def find_sources(status: Mapping[str, Any], members: Sequence[Member], current: int) -> Iterator[Source]:
    """Sources for a newcomer, the best first: trainers that hold the version, engines, trainers that do not.

    Pure; never without any. When the trainers are gone and no engine can lend they are named all the same:
    connecting to them raises the error that says so.

    Args:
        status: the coordinator's.
        members: of the group, without the newcomer.
        current: the version that they serve, 0 for none.
    """
    rows = list(status["trainers"].values())
    are_alive = len(rows) == status["world_size"] > 0 and all(row["alive"] for row in rows)
    are_readable = current > 0 and all(row["version"] == current and not row["writing"] for row in rows)
    lenders = [member for member in members if current and member.version == current][:MAX_LENDERS]
    if are_alive and are_readable:
        yield Source(None, has_version=True)
    for member in lenders:
        yield Source(member, has_version=True)
    if (are_alive and not are_readable) or not (are_alive or lenders):
        yield Source(None, has_version=False)


class Welcome:
    """Has one engine join a group. Used by the driver's thread, once.

    Args:
        client: of the group's coordinator.
        pool: threads for talking to engines.
        newcomer: the engine.
        asked: what every engine is told at connect.
        timeout_s: for each phase, in seconds.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        pool: ThreadPoolExecutor,
        newcomer: Member,
        asked: Mapping[str, Any],
        timeout_s: float,
    ) -> None:
        self._client, self._pool, self._newcomer = client, pool, newcomer
        self._asked, self._timeout_s = dict(asked), timeout_s

    def join(self, members: Sequence[Member], current: int) -> SyncReport | None:
        """Connect the newcomer and bring it to ``current``, from the first source that does.

        Returns:
            The report of its first sync; None when it has none and waits for the next version.

        Raises:
            RdtError: of the last source that was tried. The newcomer may be connected.
        """
        sources = list(find_sources(self._client.status(), members, current))
        for source in sources[:-1]:
            try:
                return self._join_at(source, current)
            except RdtError as error:
                logger.info("engine %s cannot join by way of %s: %s", self._newcomer.url, source, error)
        return self._join_at(sources[-1], current)

    def _join_at(self, source: Source, current: int) -> SyncReport | None:
        progress = Progress(current)
        if source.lender is None:
            with progress.enter("publish_wait"):
                self._newcomer.connect(self._asked, self._timeout_s)
            return self._catch_up(progress) if source.has_version else None
        lender = source.lender
        try:
            with progress.enter("publish_wait"):
                lender.call("lend", {"version": current}, _CALL_TIMEOUT_S)
                borrowed = {"lender": lender.url, "lent_version": current}
                self._newcomer.connect({**self._asked, **borrowed}, self._timeout_s)
            return self._catch_up(progress)
        finally:
            self._reclaim(lender)

    def _catch_up(self, progress: Progress) -> SyncReport | None:
        if self._newcomer.version >= progress.version:
            return None
        life = str(self._client.status()["life"])
        options = UpdateOptions(timeout_s=self._timeout_s)
        attempt = Round(self._client, self._pool, [self._newcomer], progress.version, options)
        with progress.enter("prepare"):
            ready = attempt.prepare(life)
        with progress.enter("commit"):
            answers = attempt.commit(ready)
        return progress.report(answers, attempt.failures)

    def _reclaim(self, lender: Member) -> None:
        try:
            lender.call("reclaim", {}, _CALL_TIMEOUT_S)
        except RdtError as error:
            logger.warning("engine %s may lend until its next version: %s", lender.url, error)
