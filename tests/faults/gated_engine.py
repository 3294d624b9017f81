"""The toy engine with gates: a test stops it at a named point of a sync, does harm, and lets it go on.

Run as ``python -m tests.faults.gated_engine --gates FOLDER --port P``. A point is armed by a file
``FOLDER/POINT.armed``; the engine then writes ``POINT.reached`` and waits until ``POINT.armed`` is gone.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from rdt_core import subscriber
from rdt_core.lifecycle import RankLife
from tests.integration import toy_engine

POINTS = ("before read", "during read", "after read", "before commit", "during commit", "after commit")
LONGEST_S = 120.0

folder = Path()


def pass_gate(point: str) -> None:
    """Wait here while the point is armed."""
    armed = folder / f"{point}.armed"
    if not armed.exists():
        return
    (folder / f"{point}.reached").touch()
    pause = threading.Event()
    for _ in range(int(LONGEST_S / 0.02)):
        if not armed.exists():
            return
        pause.wait(0.02)


class GatedLife(RankLife):
    """A rank's life, which its reader asks before every step whether to go on."""

    _num_asked = 0

    def begin_read(self, version: int) -> int:
        self._num_asked = 0
        return super().begin_read(version)

    def check_wanted(self, attempt: int, version: int) -> None:
        # Asked before the lease is taken, before each trainer rank's pull, and when all bytes are there.
        if self._num_asked < 4:
            pass_gate(("before read", "", "during read", "after read")[self._num_asked])
        self._num_asked += 1
        super().check_wanted(attempt, version)

    def begin_flip(self, version: int) -> None:
        pass_gate("before commit")
        super().begin_flip(version)

    def end_flip(self) -> None:
        super().end_flip()
        pass_gate("after commit")


class GatedModel(toy_engine.ToyEngineModel):
    """A model whose last step of a commit can be stopped, or made to raise."""

    def finalize(self) -> None:
        pass_gate("during commit")
        if (folder / "raise").exists():
            raise RuntimeError("finalize raised, as a test wanted")
        super().finalize()


def main() -> None:
    """Serve until ended."""
    global folder  # noqa: PLW0603  gates are reached from objects that product code makes
    at = sys.argv.index("--gates")
    folder = Path(sys.argv[at + 1])
    del sys.argv[at : at + 2]
    # Product code has no seam for this, and needs none.
    vars(subscriber)["RankLife"] = GatedLife
    vars(toy_engine)["ToyEngineModel"] = GatedModel
    toy_engine.main()


if __name__ == "__main__":
    main()
