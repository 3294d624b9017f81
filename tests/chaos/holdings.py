"""What the processes of a chaos run hold, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHARED_MEMORY = Path("/dev") / "shm"
MAX_GROWN_FDS = 24
"""Ray keeps a connection to every peer that it knew until it looks."""

MAX_GROWN_RSS = 0.15
SLACK_NBYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one process and its children hold."""

    num_fds: int
    num_shared: int
    resident_nbytes: int


def look_at(pid: int) -> Holdings | None:
    """What a process and its children hold now; None when it has gone."""
    num_fds = num_shared = resident_nbytes = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            num_fds += process.num_fds()
            mapped = {Path(entry.path) for entry in process.memory_maps()}
            num_shared += sum(path.is_relative_to(_SHARED_MEMORY) for path in mapped)
            resident_nbytes += process.memory_info().rss
    except psutil.Error:
        return None
    return Holdings(num_fds, num_shared, resident_nbytes)


def find_grown(
    before: Mapping[str, Holdings], after: Mapping[str, Holdings], num_reconnects: int
) -> list[str]:
    """What grew in whom that lived through the run.

    Args:
        before: by name.
        after: by name.
        num_reconnects: how often the engines connected anew. Over NIXL that leaves a socket in each neighbour
            that read together with one before (docs/operations.md), two at most here, and none in place.
    """
    found = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if new.num_fds > old.num_fds + MAX_GROWN_FDS + num_reconnects:
            found.append(f"{name}: {new.num_fds - old.num_fds} more file descriptors")
        if new.num_shared > old.num_shared:
            found.append(f"{name}: {new.num_shared - old.num_shared} more shared segments")
        if new.resident_nbytes > old.resident_nbytes * (1 + MAX_GROWN_RSS) + SLACK_NBYTES:
            found.append(f"{name}: {(new.resident_nbytes - old.resident_nbytes) >> 20} MiB more")
    return sorted(found)
