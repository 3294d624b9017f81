"""Runs probes in forks of a process that has imported vLLM, which takes longer than a probe itself.

Run as ``python -m tests.e2e.vllm.probe_forks``. Reads one JSON list a line, a probe's arguments, variables of
its own, and a file for what it prints; answers each with the exit status of its fork.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import TYPE_CHECKING

from tests.e2e.vllm import probe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def run(arguments: Sequence[str], variables: Mapping[str, str], output: str) -> int:
    """One probe, in a fork; its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            into = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(into, sys.stdout.fileno())
            os.dup2(into, sys.stderr.fileno())
            os.environ.update(variables)
            probe.main(arguments)
            status = 0
        except BaseException:  # noqa: BLE001  whatever it is, a fork must not go on in its parent's code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(ended)


def main() -> None:
    """Import, then fork for every line until there is none."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # vLLM talks on it.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from vllm import LLM  # noqa: F401  so that forks have it

    # A stock vLLM is one whose process has not seen our plugin.
    assert "rdt_vllm" not in sys.modules
    for line in sys.stdin:
        arguments, variables, output = json.loads(line)
        print(run(arguments, variables, output), file=answers, flush=True)


if __name__ == "__main__":
    main()
