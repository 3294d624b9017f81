"""``python -m tests.chaos --minutes 10``: faults at random while engines serve, and what came of it.

nox -s chaos runs it. The seed is printed; ``--seed N`` plays a run again, ``--replay REPORT.json`` the
schedule of a report. Exit status 1 when an answer was mixed, a version went back, something hung, grew or
raised what is not ours: then the last line says what.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import secrets
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.chaos.engines import KINDS, THIS_PYTHON
from tests.chaos.holdings import find_grown
from tests.chaos.plan import from_plain, plan_faults, to_plain
from tests.chaos.report import describe
from tests.chaos.session import HANG_S, Session
from tests.chaos.words import failure_line, table
from tests.e2e.tiny_models import save_checkpoint
from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.chaos.holdings import Holdings
    from tests.chaos.plan import Fault

_SHOW_S = 10.0
_END_S = 60.0
_SETTLE_S = 60.0
"""Within this, connections to parties that are gone are let go."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="nox -s chaos --", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="of load and faults")
    parser.add_argument("--seed", type=int, help="of the schedule; drawn and printed by default")
    parser.add_argument(
        "--replay", type=Path, help="a report (--json) whose schedule and engines to use again"
    )
    parser.add_argument(
        "--engines", default="vllm,plain,plain", help=f"of {', '.join(KINDS)}; three, separated by commas"
    )
    parser.add_argument("--sglang-python", default=THIS_PYTHON, help="where sglang is installed")
    parser.add_argument("--json", type=Path, help="write the report there")
    return parser.parse_args(arguments)


class Screen:
    """Progress: one line that is rewritten on a terminal, one every ten seconds elsewhere."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._is_terminal = seconds, sys.stderr.isatty()
        self._shown_s = -_SHOW_S
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """Something happened."""
        with self._lock:
            print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)  # noqa: T201  a command

    def show(self, session: Session, passed_s: float) -> None:
        """How far it is."""
        answers = sum(len(load.answers) for load in session.loads)
        failed = sum(session.updates.values()) - session.updates["done"]
        done, num_faults = session.updates["done"], sum(session.faults.values())
        line = (
            f"{passed_s:4.0f}/{self._seconds:.0f} s  version {session.version}  {done} syncs, "
            f"{failed} failed  {num_faults} faults  {answers} answers"
        )
        if self._is_terminal:
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)  # noqa: T201  a command
        elif passed_s - self._shown_s >= _SHOW_S:
            self._shown_s = passed_s
            self.say(line)


def main() -> int:
    """Run, print a table, return the exit status."""
    args = parse(sys.argv[1:])
    seed = args.seed if args.seed is not None else secrets.randbelow(10**6)
    places, faults, seconds = args.engines.split(","), plan_faults(seed, args.minutes * 60), args.minutes * 60
    if args.replay:
        earlier = json.loads(args.replay.read_text(encoding="utf-8"))
        seed, places, seconds = earlier["seed"], earlier["engines"], earlier["seconds"]
        faults = from_plain(earlier["schedule"])
    screen = Screen(seconds)
    screen.say(
        f"seed {seed}: {len(faults)} faults in {seconds:.0f} s; "
        f"again with --seed {seed} --minutes {seconds / 60:g}"
    )
    again = f"--seed {seed} --minutes {seconds / 60:g} --engines {','.join(places)}"
    pythons = {**dict.fromkeys(KINDS, THIS_PYTHON), "sglang": args.sglang_python}
    try:
        with tempfile.TemporaryDirectory(prefix="rdt-chaos-", dir="/tmp") as folder, local_ray(num_gpus=1):
            checkpoint = save_checkpoint("qwen3", 0, Path(folder))
            with contextlib.closing(Session(places, pythons, checkpoint, screen.say)) as session:
                threading.Thread(target=watch, args=(session, again), daemon=True).start()
                report = play(session, faults, seconds, screen)
    except Exception as error:  # noqa: BLE001  whatever it is, the last line names it
        traceback.print_exc()
        print(failure_line([f"exception: {type(error).__name__}: {error}"], again), flush=True)  # noqa: T201
        return 1
    report = {"seed": seed, "seconds": seconds, "engines": places, **report, "schedule": to_plain(faults)}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report), flush=True)  # noqa: T201  a command
    if report["reasons"]:
        print(failure_line(report["reasons"], again), flush=True)  # noqa: T201  a command
    return 1 if report["reasons"] else 0


def watch(session: Session, again: str) -> None:
    """When the driver hangs: print every thread's stack, end what can be ended, and then this process."""
    while session.in_call_s <= HANG_S:
        time.sleep(1.0)  # between two looks
    faulthandler.dump_traceback(all_threads=True)
    line = failure_line([f"hangs: the driver is in {session.in_call} for over {HANG_S:.0f} s"], again)

    def end() -> None:
        print(line, flush=True)  # noqa: T201  a command
        os._exit(1)

    last = threading.Timer(_END_S, end)
    last.daemon = True
    last.start()
    session.close()
    end()


def play(session: Session, faults: list[Fault], seconds: float, screen: Screen) -> dict[str, Any]:
    """Start, run, judge."""
    began = time.monotonic()
    session.start()
    screen.say(f"engines serve after {time.monotonic() - began:.0f} s")
    before = session.hold()
    session.run(faults, seconds, lambda passed_s: screen.show(session, passed_s))
    session.stop_load()
    return describe(session, before, wait_until_settled(session, before))


def wait_until_settled(session: Session, before: Mapping[str, Holdings]) -> dict[str, Holdings]:
    """What everybody holds once nobody holds more than before, or after a minute."""
    deadline = time.monotonic() + _SETTLE_S
    while find_grown(before, after := session.hold(), session.num_reconnects) and time.monotonic() < deadline:
        time.sleep(1.0)  # between two looks
    return after


if __name__ == "__main__":
    sys.exit(main())
