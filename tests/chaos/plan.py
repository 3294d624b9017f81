"""Which fault comes when: all of it follows from a seed, so that a run can be played again."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# How often each comes among the others, and for how long it lasts, in seconds.
_WEIGHTS = {
    "kill engine": (3, (0.0, 0.0)),
    "stop engine": (4, (0.5, 4.0)),
    "kill trainer": (1, (0.0, 0.0)),
    "stop trainer": (3, (0.5, 4.0)),
    "kill coordinator": (2, (0.0, 0.0)),
    "stop coordinator": (3, (0.5, 4.0)),
    "drop driver": (2, (0.0, 0.0)),
    "switch mode": (3, (0.0, 0.0)),
}
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 6.0
_QUIET_END_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Args:
        at_s: from the beginning of the load.
        kind: what is done.
        target: which of the engines or ranks, as a number to be taken modulo how many there are.
        lasts_s: how long something is stopped.
    """

    at_s: float
    kind: str
    target: int
    lasts_s: float


def plan_faults(seed: int, seconds: float) -> list[Fault]:
    """The faults of a run, in order. The last seconds stay quiet, so that the end is no accident."""
    draw = random.Random(seed)  # noqa: S311  no secret depends on it
    faults = []
    at_s = draw.uniform(_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S)
    while at_s < seconds - _QUIET_END_S:
        kind = draw.choices(list(_WEIGHTS), [weight for weight, _ in _WEIGHTS.values()])[0]
        lasts_s = draw.uniform(*_WEIGHTS[kind][1])
        faults.append(Fault(at_s=at_s, kind=kind, target=draw.randrange(60), lasts_s=lasts_s))
        at_s += lasts_s + draw.uniform(_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S)
    return faults


def to_plain(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """For the report."""
    return [asdict(fault) for fault in faults]


def from_plain(faults: Sequence[Mapping[str, Any]]) -> list[Fault]:
    """From a report."""
    return [Fault(**fault) for fault in faults]
