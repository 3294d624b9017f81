"""How the reads of engine ranks ended, for the driver that waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdt_core.signals import Signal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rdt_core.words import Outcome

    Member = tuple[str, int]


class _Awaited:
    """What one call waits for: every member's outcome of an attempt, or an error of any."""

    def __init__(self, attempt: str, members: Iterable[Member], clock: Callable[[], float]) -> None:
        self.attempt, self.members = attempt, frozenset(members)
        self.missing = set(self.members)
        self.has_failed = False
        self.decided = Signal(clock)

    @property
    def is_decided(self) -> bool:
        return self.has_failed or not self.missing

    def note(self, member: Member, attempt: str, outcome: Outcome) -> None:
        if attempt == self.attempt and member in self.members:
            self.missing.discard(member)
            self.has_failed |= outcome.error is not None

    def forget(self, member: Member) -> None:
        if member in self.members:
            self.missing.add(member)


class ReadOutcomes:
    """The last outcome of every member, and those who wait for some.

    Args:
        clock: seconds, growing.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: dict[Member, tuple[str, Outcome]] = {}
        self._awaited: set[_Awaited] = set()

    def note(self, member: Member, attempt: str, outcome: Outcome) -> None:
        """How a member's read ended in this attempt."""
        self._last[member] = (attempt, outcome)
        for awaited in self._awaited:
            awaited.note(member, attempt, outcome)
            if awaited.is_decided:
                awaited.decided.wake()

    def forget(self, member: Member) -> None:
        """A member has joined anew or left: what it said before is void."""
        self._last.pop(member, None)
        for awaited in self._awaited:
            awaited.forget(member)

    async def wait(self, attempt: str, members: Iterable[Member], timeout_s: float) -> dict[Member, Outcome]:
        """The members' outcomes, once all have ended or one has failed; what there is when time is up."""
        awaited = _Awaited(attempt, members, self._clock)
        for member in awaited.members & self._last.keys():
            awaited.note(member, *self._last[member])
        self._awaited.add(awaited)
        try:
            await awaited.decided.wait(lambda: awaited.is_decided, timeout_s)
        finally:
            self._awaited.discard(awaited)
        found = ((member, self._last.get(member)) for member in awaited.members)
        return {member: entry[1] for member, entry in found if entry and entry[0] == attempt}
