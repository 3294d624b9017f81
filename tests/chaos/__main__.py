"""``python -m tests.chaos --minutes 10``: faults at random while engines serve, and what came of it.

nox -s chaos runs it. The seed is printed; ``--seed N`` plays a run again, ``--replay REPORT.json`` the
schedule of a report. Exit status 1 when an answer was mixed, a version went back, something hung or grew.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.chaos.engines import KINDS, THIS_PYTHON
from tests.chaos.holdings import find_grown
from tests.chaos.model import Reference
from tests.chaos.plan import from_plain, plan_faults, to_plain
from tests.chaos.session import HANG_S, Session
from tests.chaos.verdict import judge
from tests.e2e.tiny_models import save_checkpoint
from tests.local_ray import local_ray

if TYPE_CHECKING:
    from tests.chaos.plan import Fault

_SHOW_S = 10.0
_END_S = 60.0


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
    pythons = {**dict.fromkeys(KINDS, THIS_PYTHON), "sglang": args.sglang_python}
    with tempfile.TemporaryDirectory(prefix="rdt-chaos-", dir="/tmp") as folder, local_ray(num_gpus=1):
        checkpoint = save_checkpoint("qwen3", 0, Path(folder))
        session = Session(places, pythons, checkpoint, screen.say)
        threading.Thread(target=watch, args=(session,), daemon=True).start()
        try:
            report = play(session, faults, seconds, screen)
        finally:
            session.close()
    report = {"seed": seed, "seconds": seconds, "engines": places, **report, "schedule": to_plain(faults)}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))  # noqa: T201  a command
    return 0 if report["is_good"] else 1


def watch(session: Session) -> None:
    """When the driver hangs: print every thread's stack, end what can be ended, and then this process."""
    while session.in_call_s <= HANG_S:
        time.sleep(1.0)  # between two looks
    faulthandler.dump_traceback(all_threads=True)
    last = threading.Timer(_END_S, os._exit, (1,))
    last.daemon = True
    last.start()
    session.close()
    os._exit(1)


def play(session: Session, faults: list[Fault], seconds: float, screen: Screen) -> dict[str, Any]:
    """Start, run, judge."""
    began = time.monotonic()
    session.start()
    screen.say(f"engines serve after {time.monotonic() - began:.0f} s")
    before = session.hold()
    session.run(faults, seconds, lambda passed_s: screen.show(session, passed_s))
    session.stop_load()
    grown = find_grown(before, session.hold())
    answers = [answer for load in session.loads for answer in load.answers]
    verdict = judge(answers, Reference().allows)
    hangs = session.hangs + [
        f"an answer of {load.name} after more than a minute" for load in session.loads for _ in load.hung_s
    ]
    served = {version for answer in answers for version in answer.versions}
    return {
        "is_good": bool(answers) and not (verdict.mixed or verdict.regressed or hangs or grown),
        "answers": len(answers),
        "answers_by_engine": {load.name: len(load.answers) for load in session.loads},
        "spanning_two_versions": sum(len(set(answer.versions)) > 1 for answer in answers),
        "versions_published": session.version,
        "versions_seen": len(served),
        "updates": dict(session.updates),
        "faults": dict(session.faults),
        "refused_as_torn": sum(load.num_refused for load in session.loads),
        "broken_by_a_killed_engine": sum(load.num_broken for load in session.loads),
        "longest_call_s": round(session.longest_call_s, 1),
        "mixed": [str(answer) for answer in verdict.mixed[:20]],
        "regressed": [str(answer) for answer in verdict.regressed[:20]],
        "hangs": hangs,
        "grown": grown,
        "held_before": {name: str(held) for name, held in before.items()},
        "held_after": {name: str(held) for name, held in session.hold().items()},
    }


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    rows = {
        name: value for name, value in report.items() if name not in ("schedule", "held_before", "held_after")
    }
    lines = [f"{name:<28} {_short(value)}" for name, value in rows.items()]
    return "\n".join(["", *lines, ""])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    if isinstance(value, list):
        return "0" if not value else f"{len(value)}: " + "; ".join(map(str, value[:3]))
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
