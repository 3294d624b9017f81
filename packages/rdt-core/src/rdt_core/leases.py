"""Who reads which version, and until when. Kept by the coordinator, so that a trainer can wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.numbering import number_a_life
from rdt_core.signals import Signal

if TYPE_CHECKING:
    from collections.abc import Callable

    Member = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Lease:
    """One engine rank's right to find a version unchanged until ``deadline``, on the coordinator's clock."""

    reader: Member
    version: int
    deadline: float


class LeaseBook:
    """Leases by number. A lease ends when it is given back or revoked, and at its deadline whatever happens.

    Args:
        clock: seconds, growing.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._numbers = number_a_life()
        self._leases: dict[int, Lease] = {}
        self._by_reader: dict[Member, int] = {}
        self._ended = Signal(clock)

    def take(self, reader: Member, version: int, ttl_s: float) -> int:
        """A new lease; an earlier one of the same reader ends. Returns its number."""
        self._leases.pop(self._by_reader.get(reader, 0), None)
        number = next(self._numbers)
        self._leases[number] = Lease(reader, version, self._clock() + ttl_s)
        self._by_reader[reader] = number
        return number

    def give_back(self, number: int) -> bool:
        """End a lease. Whether it had held until now."""
        lease = self._leases.pop(number, None)
        if lease is None:
            return False
        if self._by_reader.get(lease.reader) == number:
            del self._by_reader[lease.reader]
        if not self._are_any_active():
            self._ended.wake()
        return self._clock() < lease.deadline

    def active(self) -> list[Lease]:
        """Every lease that holds now."""
        now = self._clock()
        return [lease for lease in self._leases.values() if now < lease.deadline]

    async def wait_until_none(self, timeout_s: float) -> bool:
        """Until no lease holds, ``timeout_s`` seconds at most; whether none does."""
        return await self._ended.wait(lambda: not self._are_any_active(), timeout_s)

    def revoke(self) -> list[Lease]:
        """End every lease; returns those that had held until now."""
        ended = self.active()
        self._leases.clear()
        self._by_reader.clear()
        self._ended.wake()
        return ended

    def _are_any_active(self) -> bool:
        now = self._clock()
        return any(now < lease.deadline for lease in self._leases.values())
