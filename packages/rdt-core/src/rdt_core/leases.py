"""Who reads which version, and until when. Kept by the coordinator, so that a trainer can wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.numbering import number_a_life

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

    def take(self, reader: Member, version: int, ttl_s: float) -> int:
        """A new lease; an earlier one of the same reader ends. Returns its number."""
        self._leases = {n: held for n, held in self._leases.items() if held.reader != reader}
        number = next(self._numbers)
        self._leases[number] = Lease(reader, version, self._clock() + ttl_s)
        return number

    def give_back(self, number: int) -> bool:
        """End a lease. Whether it had held until now."""
        lease = self._leases.pop(number, None)
        return lease is not None and self._clock() < lease.deadline

    def active(self) -> list[Lease]:
        """Every lease that holds now."""
        now = self._clock()
        self._leases = {number: lease for number, lease in self._leases.items() if now < lease.deadline}
        return list(self._leases.values())

    def revoke(self) -> list[Lease]:
        """End every lease; returns those that had held until now."""
        ended = self.active()
        self._leases.clear()
        return ended
