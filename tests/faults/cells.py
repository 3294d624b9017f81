"""The fault matrix as data: what is done to whom at which point, and what must come of it.

``python -m tests.faults.cells`` prints it as the table of docs/reliability.md; test_matrix.py runs every row.
"""

from __future__ import annotations

from dataclasses import dataclass

UPDATE_TIMEOUT_S = 10.0
"""What every cell passes to ``update``; an engine gets five seconds on top."""

AT_ONCE_S = 8.0
"""For what does not wait for a deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row.

    Args:
        victim: ``trainer`` (rank 1), ``engine`` (the first of two), ``coordinator`` or ``driver``.
        fault: ``SIGKILL``, ``SIGSTOP`` or ``exception``.
        point: of the sync.
        mode: of the engines.
        sees: the error that ``update`` raises, by the type of its cause; empty when it succeeds.
        within_s: seconds from the harm until the user sees it.
        serves: what an engine that lives serves then: ``old``, ``new`` or ``nothing`` (it refuses, torn).
        repair: what brings everything to the next version.
    """

    victim: str
    fault: str
    point: str
    mode: str = "staged"
    sees: str
    within_s: float
    serves: str
    repair: str

    @property
    def name(self) -> str:
        """For the test's id."""
        return f"{self.victim} {self.fault} {self.point} {self.mode}"


_LATE_S = UPDATE_TIMEOUT_S + 5.0 + AT_ONCE_S
_RESTART = "restart the trainers under the same name; engines find them"
_REPLACE = "remove the engine, add another"
_NOTHING = "nothing; update again"

CELLS = (
    Cell(victim="trainer", fault="SIGKILL", point="publish", sees="SourceDiedError", within_s=_LATE_S,
         serves="old", repair=_RESTART),
    Cell(victim="trainer", fault="SIGKILL", point="during read", sees="SourceDiedError", within_s=_LATE_S,
         serves="old", repair=_RESTART),
    Cell(victim="trainer", fault="SIGKILL", point="after read", sees="", within_s=_LATE_S, serves="new",
         repair=_RESTART),
    Cell(victim="trainer", fault="SIGKILL", point="before commit", mode="inplace", sees="SourceDiedError",
         within_s=_LATE_S, serves="nothing", repair=_RESTART),
    Cell(victim="engine", fault="SIGKILL", point="before read", sees="EngineUnreachableError",
         within_s=AT_ONCE_S, serves="old", repair=_REPLACE),
    Cell(victim="engine", fault="SIGKILL", point="during commit", sees="EngineUnreachableError",
         within_s=AT_ONCE_S, serves="new", repair=_REPLACE),
    Cell(victim="engine", fault="SIGSTOP", point="during read", sees="DeadlineError", within_s=_LATE_S,
         serves="old", repair="SIGCONT; update again"),
    Cell(victim="engine", fault="exception", point="during commit", sees="RdtError", within_s=AT_ONCE_S,
         serves="nothing", repair=_NOTHING),
    Cell(victim="coordinator", fault="SIGKILL", point="publish", sees="", within_s=_LATE_S, serves="new",
         repair=_NOTHING),
    Cell(victim="coordinator", fault="SIGKILL", point="before commit", sees="", within_s=_LATE_S,
         serves="new", repair=_NOTHING),
    Cell(victim="coordinator", fault="SIGSTOP", point="before commit", sees="", within_s=AT_ONCE_S,
         serves="new", repair="SIGCONT; update again"),
    Cell(victim="driver", fault="SIGKILL", point="after read", sees="", within_s=_LATE_S, serves="old",
         repair="connect again; update"),
)  # fmt: skip


def table() -> str:
    """The rows in Markdown."""
    lines = [
        "| who | what | when | mode | `update` raises | within | engines alive serve | repaired by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {cell.victim} | {cell.fault} | {cell.point} | {cell.mode} | {cell.sees or 'nothing'} "
        f"| {cell.within_s:.0f} s | {cell.serves} | {cell.repair} |"
        for cell in CELLS
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201  its one purpose
