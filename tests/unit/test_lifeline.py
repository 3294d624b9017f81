from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdt_core.transports.lifeline import Anchor, Lifeline, LifelineBrokenError

HOLD = """
import os, sys
from rdt_core.transports.lifeline import Anchor
anchor = Anchor()
if "fork" in sys.argv and os.fork() == 0:
    print(anchor.name, os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
if "fork" not in sys.argv:
    print(anchor.name, 0, flush=True)
sys.stdin.read()
"""


def start_holder(*arguments: str) -> tuple[subprocess.Popen[str], str, int]:
    """A process with an anchor; its name, and the id of a forked child that inherited it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    name, child = process.stdout.readline().split()
    return process, name, int(child)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(30)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def test_a_lifeline_holds_while_its_anchor_does() -> None:
    anchor = Anchor()
    lifeline = Lifeline(anchor.name)
    lifeline.check()
    lifeline.check()
    anchor.close()
    anchor.close()
    with pytest.raises(LifelineBrokenError, match="export was closed"):
        lifeline.check()
    lifeline.close()


def test_a_killed_process_breaks_it() -> None:
    process, name, _ = start_holder()
    lifeline = Lifeline(name)
    lifeline.check()
    end(process)
    with pytest.raises(LifelineBrokenError, match="process has ended"):
        lifeline.check()
    lifeline.close()


def test_a_forked_child_that_inherited_the_anchor_does_not_stand_for_its_parent() -> None:
    process, name, child = start_holder("fork")
    lifeline = Lifeline(name)
    lifeline.check()
    end(process)
    with pytest.raises(LifelineBrokenError, match="process has ended"):
        lifeline.check()
    lifeline.close()
    os.kill(child, 9)


def test_an_anchor_that_was_never_there_is_refused() -> None:
    with pytest.raises(LifelineBrokenError):
        Lifeline("0123456789abcdef")


def test_a_closed_lifeline_is_broken_and_closes_again_quietly() -> None:
    anchor = Anchor()
    lifeline = Lifeline(anchor.name)
    lifeline.close()
    lifeline.close()
    with pytest.raises(LifelineBrokenError, match="link was closed"):
        lifeline.check()
    anchor.close()


def test_a_thousand_lifelines_leave_no_file_descriptor_behind() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(1000):
        anchor = Anchor()
        lifeline = Lifeline(anchor.name)
        lifeline.check()
        lifeline.close()
        anchor.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
