"""A driver that a test may kill, stop and interrupt: ``python -m tests.faults.driver_process GROUP URL...``.

Reads ``connect MODE TIMEOUT_S`` and ``update VERSION TIMEOUT_S`` from stdin and answers each with a line:
what was raised, by the type of its reason, and nothing after the prefix when it succeeded.
"""

from __future__ import annotations

import signal
import sys
import time

from rdt_core import WeightSync
from rdt_core.errors import RdtError, UpdateFailedError

ANSWER = "driver: "


def reason_of(error: BaseException) -> str:
    """The type of an error; for a failed update, of its reason."""
    is_named_by_rank = isinstance(error, UpdateFailedError) and error.__cause__ is not None
    return type(error.__cause__ if is_named_by_rank else error).__name__


def main() -> None:
    """Do as told until stdin ends; Ctrl-C ends only what is under way."""
    group, *engines = sys.argv[1:]
    sync: WeightSync | None = None
    # Whatever the shell that runs the tests made of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        started = time.monotonic()
        try:
            match line.split():
                case ["connect", mode, timeout_s]:
                    sync = WeightSync.connect(group, engines, mode=mode, timeout_s=float(timeout_s))
                case ["update", version, timeout_s] if sync:
                    sync.update(int(version), timeout_s=float(timeout_s))
                case words:
                    raise ValueError(words)
        except (RdtError, KeyboardInterrupt) as error:
            print(f"{error} after {time.monotonic() - started:.1f} s", file=sys.stderr)  # noqa: T201  for people
            answer(reason_of(error))
        else:
            answer("")


def answer(what: str) -> None:
    print(ANSWER + what, flush=True)  # noqa: T201  read by who started us


if __name__ == "__main__":
    main()
