"""The numbers that a coordinator gives to leases and tasks."""

from __future__ import annotations

import itertools
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_BITS = 60


def number_a_life() -> Iterator[int]:
    """Growing numbers, more than 0, of which no other life of a coordinator gives any: they begin at random.

    Whoever was given a number may name it to the next coordinator, where it must mean nothing: it would end
    another reader's lease there, or have the answer about one reader's memory taken for another's.
    """
    return itertools.count(1 + secrets.randbits(_START_BITS))
