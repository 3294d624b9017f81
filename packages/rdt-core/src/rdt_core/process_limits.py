"""What the coordinator's process asks of its system: a share of a busy CPU, and sockets.

Ray starts its workers at niceness 15: beside processes that spin on every core, such as an engine's
schedulers, they get a thirtieth of one. Work can wait for its turn; the coordinator's answers, and what it
hears of its members, cannot, and take next to nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from pathlib import Path

logger = logging.getLogger(__name__)

_THREADS = Path("/proc/self/task")


def leave_niceness() -> bool:
    """Bring all threads of this process back to the usual niceness of 0; those that they start inherit it.

    Returns:
        Whether that was allowed: it takes CAP_SYS_NICE, which root has, or a fitting RLIMIT_NICE.
        ``RAY_worker_niceness=0`` where ``ray start`` runs does the same for all of Ray's workers.
    """
    if os.nice(0) <= 0 or not _THREADS.is_dir():
        return True
    try:
        for thread in _THREADS.iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)
    except PermissionError:
        logger.info("stays at niceness %d: no permission to change it", os.nice(0))
        return False
    return True


def open_many_files() -> None:
    """Let this process hold as many sockets as it may: every member of a large group has two of them."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # some systems say unlimited and do not take it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
