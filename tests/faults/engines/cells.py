"""The rows of the matrix that real engines play: two ranks each, beside one trainer and one driver."""

from __future__ import annotations

from tests.faults.cells import POINTS, Cell

_RESTART = "restart the engine; add it"
_GONE = "nothing: it is gone"
_READS = POINTS[2:5]
_COMMITS = POINTS[5:]

_KILLED = dict.fromkeys(POINTS, ("EngineUnreachableError", _GONE))
_STOPPED = {
    "connect": ("", "old"),
    "publish": ("EngineUnreachableError", "old"),
    **dict.fromkeys(_READS, ("DeadlineError", "old")),
    **dict.fromkeys(_COMMITS, ("EngineUnreachableError", "new")),
}
_RAISED = {
    "connect": ("RdtError", "old"),
    **dict.fromkeys(_READS, ("RdtError", "old")),
    "before commit": ("RdtError", "nothing"),
    "during commit": ("RdtError", "nothing"),
    "after commit": ("RdtError", "new"),
}

_EXPECTED = {
    ("engine rank", "SIGKILL"): (_RESTART, _KILLED),
    ("engine rank", "SIGSTOP"): ("SIGCONT; update again", _STOPPED),
    ("engine rank", "exception"): ("update again", _RAISED),
    ("engine", "SIGKILL"): (_RESTART, _KILLED),
    ("engine", "SIGSTOP"): ("SIGCONT; update again", _STOPPED),
}

# A stop ends shortly before the deadline: whether the engine then makes it depends on its speed. And a server
# that is stopped with its ranks may not have answered yet that they have begun to read.
_OR_ELSE = {("SIGSTOP", point): ("EngineUnreachableError", "old") for point in ("connect", *_READS)}

ENGINES = ("vllm", "sglang")


def cells_of(engine: str) -> tuple[Cell, ...]:
    """The cells of ``vllm`` or ``sglang``; what kills comes last, since it costs a start."""
    in_place = Cell(
        victim=f"{engine} engine rank",
        fault="exception",
        point="during commit",
        mode="inplace",
        sees="RdtError",
        serves="nothing",
        repair="update again",
    )
    return in_place, *(
        Cell(
            victim=f"{engine} {victim}",
            fault=fault,
            point=point,
            sees=sees,
            serves=serves,
            or_else=_OR_ELSE.get((fault, point)),
            repair=repair,
        )
        for (victim, fault), (repair, points) in sorted(
            _EXPECTED.items(), key=lambda entry: ("exception", "SIGSTOP", "SIGKILL").index(entry[0][1])
        )
        for point, (sees, serves) in points.items()
    )
