"""The fault matrix as data: what is done to whom at which point of a sync, and what must come of it.

test_matrix.py runs the cells with toy engines, engines/ runs those of real ones. What a run measured is in
results.json, from which docs/reliability.md shows the table (``python -m tests.unit.test_reliability_page``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UPDATE_TIMEOUT_S = 8.0
"""What every cell passes to ``connect`` and ``update``; whoever is asked gets some seconds on top."""

STOPPED_S = 20.0
"""How long a process is stopped that gets SIGSTOP: longer than any single wait of an update."""

LIMIT_S = 60.0
"""By when the user must have an answer in every cell, also on a machine that does much else."""

POINTS = (
    "connect",
    "publish",
    "before read",
    "during read",
    "after read",
    "before commit",
    "during commit",
    "after commit",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row.

    Args:
        victim: ``trainer`` (rank 1 of 2), ``engine`` (the first of two), ``engine rank`` (one worker of it),
            ``coordinator``, ``driver``, or what surrounds them.
        fault: ``SIGKILL``, ``SIGSTOP``, ``exception``, or what befalls the surroundings.
        point: of the sync.
        mode: of the engines.
        sees: the error that ``connect`` or ``update`` raises, by the type of its reason; empty for none.
        serves: what an engine that lives serves then: ``old``, ``new`` or ``nothing`` (it refuses, torn).
        or_else: another (sees, serves) that the kernel or the order of two messages may bring about.
        repair: what brings every engine to the next version.
        is_quick: whether it belongs to the part that CI runs.
    """

    victim: str
    fault: str
    point: str
    mode: str = "staged"
    sees: str
    serves: str
    or_else: tuple[str, str] | None = None
    repair: str
    is_quick: bool = False

    @property
    def name(self) -> str:
        """For the test's id, and for the row's key in the results."""
        return f"{self.victim} {self.fault} {self.point} {self.mode}"

    def allows(self, sees: str, serves: str) -> bool:
        """Whether this may come of it."""
        return (sees, serves) in ((self.sees, self.serves), self.or_else)


_RESTART = "restart the trainers under the same name"
_REPLACE = "remove the engine, add another"
_RECONNECT = "a new driver connects; update"
_CONTINUE = "SIGCONT; update again"
_NOTHING = "update again"

_AFTER_READ = ("after read", "before commit", "during commit", "after commit")
_IN_COMMIT = _AFTER_READ[1:]
_FIRST_OLD = "old; the other: new"
_FIRST_TORN = "nothing; the other: new"

# By victim and fault: the repair, and for each point what the user sees and what is served.
_EXPECTED: dict[tuple[str, str], tuple[str, dict[str, tuple[str, str]]]] = {
    # Stops first: what is killed later is then read by engines whose reads were once interrupted.
    ("trainer", "SIGSTOP"): (
        _CONTINUE,
        {
            "connect": ("MissingTrainerRankError", "old"),
            "publish": ("NotPublishedError", "old"),
            "before read": ("PullTimeoutError", "old"),
            "during read": ("PullTimeoutError", "old"),
            **dict.fromkeys(_AFTER_READ, ("", "new")),
        },
    ),
    ("engine", "SIGSTOP"): (
        _CONTINUE,
        {
            "connect": ("", "old"),
            "publish": ("EngineUnreachableError", "old"),
            **dict.fromkeys(POINTS[2:5], ("DeadlineError", "old")),
            **dict.fromkeys(_IN_COMMIT, ("EngineUnreachableError", "new")),
        },
    ),
    ("trainer", "SIGKILL"): (
        _RESTART,
        {
            "connect": ("MissingTrainerRankError", "old"),
            "publish": ("NotPublishedError", "old"),
            "before read": ("SourceDiedError", "old"),
            "during read": ("SourceDiedError", "old"),
            **dict.fromkeys(_AFTER_READ, ("", "new")),
        },
    ),
    ("trainer", "exception"): (
        "publish; update again",
        {
            "connect": ("RdtError", "old"),
            "publish": ("NotPublishedError", "old"),
            "before read": ("ReleasedError", "old"),
            "during read": ("ReleasedError", "old"),
            **dict.fromkeys(_AFTER_READ, ("", "new")),
        },
    ),
    ("engine", "SIGKILL"): (
        _REPLACE,
        {
            **dict.fromkeys(POINTS[:5], ("EngineUnreachableError", "old")),
            **dict.fromkeys(_IN_COMMIT, ("EngineUnreachableError", "new")),
        },
    ),
    ("engine", "exception"): (
        _NOTHING,
        {
            "connect": ("RdtError", "old"),
            **dict.fromkeys(POINTS[2:5], ("RdtError", "old")),
            "before commit": ("RdtError", _FIRST_OLD),
            "during commit": ("RdtError", _FIRST_TORN),
            "after commit": ("RdtError", "new"),
        },
    ),
    ("coordinator", "SIGKILL"): (
        _NOTHING,
        {"connect": ("", "old"), **dict.fromkeys(POINTS[1:], ("", "new"))},
    ),
    ("coordinator", "SIGSTOP"): (
        _CONTINUE,
        {
            **dict.fromkeys(POINTS[:5], ("DeadlineError", "old")),
            **dict.fromkeys(_IN_COMMIT, ("", "new")),
        },
    ),
    ("coordinator", "exception"): (
        _NOTHING,
        {
            "connect": ("RdtError", "old"),
            **dict.fromkeys(("publish", "before read", "after read", "after commit"), ("", "new")),
        },
    ),
    ("driver", "SIGKILL"): (
        _RECONNECT,
        {**dict.fromkeys(POINTS[:5], ("", "old")), **dict.fromkeys(_IN_COMMIT, ("", "new"))},
    ),
    ("driver", "SIGSTOP"): (
        _CONTINUE,
        {
            "connect": ("", "old"),
            "publish": ("DeadlineError", "old"),
            **dict.fromkeys(POINTS[2:], ("", "new")),
        },
    ),
    ("driver", "exception"): (
        _NOTHING,
        {
            **dict.fromkeys(POINTS[:5], ("KeyboardInterrupt", "old")),
            **dict.fromkeys(_IN_COMMIT, ("KeyboardInterrupt", "new")),
        },
    ),
}

_OR_ELSE = {
    # The kernel may copy from the memory of a process that stands still.
    ("trainer", "SIGSTOP", "before read"): ("", "new"),
    ("trainer", "SIGSTOP", "during read"): ("", "new"),
    # The answer lies there when the driver wakes, and so does the end of its deadline.
    ("driver", "SIGSTOP", "publish"): ("", "new"),
}

_QUICK = {
    ("trainer", "SIGKILL", "during read"),
    ("trainer", "exception", "during read"),
    ("engine", "SIGKILL", "before read"),
    ("engine", "SIGKILL", "during commit"),
    ("engine", "SIGSTOP", "during read"),
    *(("engine", "exception", point) for point in POINTS),
    ("coordinator", "SIGKILL", "publish"),
    ("coordinator", "SIGKILL", "during read"),
    ("coordinator", "SIGKILL", "before commit"),
    ("coordinator", "SIGSTOP", "before commit"),
    *(("coordinator", "exception", point) for point in POINTS),
    ("driver", "SIGKILL", "after read"),
    ("driver", "exception", "during read"),
}

IMPOSSIBLE = {
    ("engine", "exception", "publish"): "an engine takes no part in it",
    ("coordinator", "exception", "during read"): "nobody calls it while bytes move",
    ("coordinator", "exception", "before commit"): "a staged commit does without it",
    ("coordinator", "exception", "during commit"): "a staged commit does without it",
}
"""Combinations that there are not, each with its reason."""


def _expand() -> tuple[Cell, ...]:
    return tuple(
        Cell(
            victim=victim,
            fault=fault,
            point=point,
            sees=sees,
            serves=serves,
            or_else=_OR_ELSE.get((victim, fault, point)),
            repair=repair,
            is_quick=(victim, fault, point) in _QUICK,
        )
        for (victim, fault), (repair, points) in _EXPECTED.items()
        for point, (sees, serves) in points.items()
    )


CELLS = (
    *_expand(),
    Cell(victim="trainer", fault="SIGKILL", point="before commit", mode="inplace", sees="SourceDiedError",
         serves=_FIRST_TORN, repair=_RESTART, is_quick=True),
    Cell(victim="trainer", fault="SIGSTOP", point="before commit", mode="inplace", sees="PullTimeoutError",
         serves=_FIRST_TORN, or_else=("", "new"), repair=_CONTINUE),
    Cell(victim="trainer", fault="exception", point="before commit", mode="inplace", sees="ReleasedError",
         serves=_FIRST_OLD, repair="publish; update again", is_quick=True),
    Cell(victim="engine", fault="exception", point="during commit", mode="inplace", sees="RdtError",
         serves=_FIRST_TORN, repair=_NOTHING, is_quick=True),
)  # fmt: skip

SURROUNDINGS = (
    Cell(victim="node of a trainer", fault="lost", point="during read", sees="SourceDiedError", serves="old",
         repair=_RESTART),
    Cell(victim="Ray head", fault="SIGKILL", point="before read", sees="SourceDiedError", serves="old",
         or_else=("CoordinatorLostError", "old"),
         repair="start another cluster and the trainers; a new driver connects", is_quick=True),
    Cell(victim="link to the trainers", fault="cut", point="during read", sees="PullTimeoutError",
         serves="old", or_else=("DeadlineError", "old"), repair="mend the link; update again"),
    Cell(victim="link to the trainers", fault="cut", point="during commit", sees="", serves="new",
         repair="mend the link; update again"),
    Cell(victim="disk", fault="full", point="before read", sees="", serves="new", repair="free the disk"),
    Cell(victim="engine", fault="fd limit", point="before read", sees="", serves="new",
         repair="raise the limit"),
)  # fmt: skip
"""Each in a cluster of its own, see ``surroundings``."""


def table(cells: Sequence[Cell], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Cells in Markdown.

    Args:
        cells: one a line.
        rows: what was measured, by the cell's name; see ``results``.
    """
    lines = [
        "| who | what | when | mode | the user sees | after | engines alive serve | repaired by | in | run |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(cell, rows.get(cell.name)) for cell in cells]
    return "\n".join(lines)


def list_impossible() -> str:
    """The combinations that there are not, in Markdown."""
    lines = ["| who | what | when | why not |", "|---|---|---|---|"]
    lines += [f"| {who} | {what} | {when} | {why} |" for (who, what, when), why in IMPOSSIBLE.items()]
    return "\n".join(lines)


def _line(cell: Cell, row: Mapping[str, Any] | None) -> str:
    place = f"| {cell.victim} | {cell.fault} | {cell.point} | {cell.mode} "
    if row is None:
        return f"{place}| {cell.sees or 'nothing'} | not run | {cell.serves} | {cell.repair} | | |"
    return (
        f"{place}| {row['sees'] or 'nothing'} | {row['seconds']:.1f} s | {row['serves']} | {cell.repair} "
        f"| {row['repair_s']:.1f} s | {row['run']} |"
    )
