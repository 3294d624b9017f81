"""What an engine rank knows of a version for which it has waited."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Admission:
    """What waiting for a version has brought.

    Args:
        lease: under which it is read; 0 for none yet.
        is_checked: whether every trainer rank held it in the moment in which it was published. Otherwise it
            is to be asked again.
    """

    lease: int = 0
    is_checked: bool = False


UNCHECKED = Admission()
"""Of a rank that has not waited, or in vain."""
