"""Gates in an engine's process: a test stops a rank at a named point of a sync, does harm, and lets it go on.

A point is armed by a file ``FOLDER/POINT.armed``: a rank that comes there writes its process id to
``POINT.reached`` and waits until ``POINT.armed`` is gone. A file ``POINT.raise`` makes the first rank that
comes there raise; that rank takes the file away.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "RDT_TEST_GATES"
POINTS = (
    "connect",
    "before read",
    "during read",
    "after read",
    "before commit",
    "during commit",
    "after commit",
)
_LOOK_S = 0.02
_LONGEST_S = 120.0


def pass_gate(point: str) -> None:
    """Wait here while the point is armed, then raise if that is wanted."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    armed = folder / f"{point}.armed"
    pause = threading.Event()
    if armed.exists():
        # Under another name first, so that a test never reads half of it.
        note = folder / f"{point}.{os.getpid()}"
        note.write_text(str(os.getpid()))
        note.replace(folder / f"{point}.reached")
    for _ in range(int(_LONGEST_S / _LOOK_S)):
        if not armed.exists():
            break
        pause.wait(_LOOK_S)
    try:
        (folder / f"{point}.raise").unlink()
    except FileNotFoundError:
        return
    raise RuntimeError(f"raised {point}, as a test wanted")


def gate_subscriber(subscriber: Any) -> None:
    """Put gates into ``rdt_core.subscriber``: product code has no seam for this, and needs none."""
    from rdt_core.lifecycle import RankLife

    class GatedLife(RankLife):
        """A rank's life, which its reader asks before every step whether to go on."""

        _num_asked = 0

        def begin_read(self, version: int) -> int:
            self._num_asked = 0
            return super().begin_read(version)

        def check_wanted(self, attempt: int, version: int) -> None:
            self._num_asked += 1
            # First it asks without the lease, then before each trainer rank's pull.
            if self._num_asked <= 2:
                pass_gate(("before read", "during read")[self._num_asked - 1])
            super().check_wanted(attempt, version)

        def end_read(self, attempt: int, version: int) -> None:
            pass_gate("after read")
            super().end_read(attempt, version)

        def begin_flip(self, version: int) -> None:
            pass_gate("before commit")
            super().begin_flip(version)

        def end_flip(self) -> None:
            super().end_flip()
            pass_gate("after commit")

    original = subscriber.open_connection

    @functools.wraps(original)
    def open_connection(*args: Any) -> Any:
        pass_gate("connect")
        return original(*args)

    subscriber.RankLife, subscriber.open_connection = GatedLife, open_connection


def gate_model(model: Any) -> None:
    """Put a gate before the last step of a commit, for a class that implements ``EngineModel``."""
    original = model.finalize

    @functools.wraps(original)
    def finalize(self: Any) -> None:
        pass_gate("during commit")
        original(self)

    model.finalize = finalize
