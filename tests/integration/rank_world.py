"""A world of real processes that run named cases together, and stop when a test says so.

In the test process: :class:`RankWorld`. In each rank: this file run as a program, which joins a gloo group
and then runs the case, with its arguments, of every line of its standard input. A case is a function of the
cases' module, or ``"other_cases.name"`` for one of a module beside it.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_ROOT = Path(__file__).parents[2]
_COLLECTIVE_TIMEOUT = timedelta(seconds=60)
_STOP_TIMEOUT_S = 5.0


class RankWorld:
    """``num_ranks`` processes in one torch.distributed world.

    Args:
        num_ranks: how many.
        cases: full name of a module; its functions are the cases.
        directory: for the rendezvous file and the ranks' logs.
        python: interpreter of the ranks, which may belong to another environment than the tests'.
    """

    def __init__(self, num_ranks: int, cases: str, directory: Path, *, python: str = sys.executable) -> None:
        self._num_ranks, self._cases, self._directory, self._python = num_ranks, cases, directory, python
        self._num_starts = 0
        self._processes: list[subprocess.Popen[str]] = []
        self._answers: list[queue.Queue[str | None]] = []

    def run(self, case: str, *arguments: object, timeout_s: float = 200.0) -> list[Any]:
        """What the case returned in each rank, by rank. Blocks until all have answered.

        Args:
            case: name of a function of the cases' module, or ``"module.name"`` of one beside it.
            arguments: plain values for it.
            timeout_s: for all ranks together.

        Raises:
            AssertionError: a rank failed, ended or did not answer in time. The world is stopped, and the next
                call starts a new one.
        """
        if not self._processes:
            self._start()
        deadline = time.monotonic() + timeout_s
        try:
            for process in self._processes:
                _pipe(process.stdin).write(json.dumps([case, *arguments]) + "\n")
                _pipe(process.stdin).flush()
            return [self._answer(rank, case, deadline) for rank in range(self._num_ranks)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process of this world. Idempotent."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(_STOP_TIMEOUT_S)
            _pipe(process.stdin).close()
        self._processes, self._answers = [], []

    def _start(self) -> None:
        self._num_starts += 1
        rendezvous = self._directory / f"rendezvous-{self._num_starts}"
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for rank in range(self._num_ranks):
            with self._log(rank).open("w") as log:
                process = subprocess.Popen(
                    [
                        self._python,
                        "-m",
                        __name__,
                        self._cases,
                        str(rank),
                        str(self._num_ranks),
                        str(rendezvous),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            answers: queue.Queue[str | None] = queue.Queue()
            reader = threading.Thread(target=_read_lines, args=(_pipe(process.stdout), answers), daemon=True)
            reader.start()
            self._processes.append(process)
            self._answers.append(answers)

    def _answer(self, rank: int, case: str, deadline: float) -> Any:
        try:
            line = self._answers[rank].get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"rank {rank} did not finish {case} in time\n{self._tail(rank)}") from None
        if line is None:
            raise AssertionError(f"rank {rank} ended during {case}\n{self._tail(rank)}")
        answer = json.loads(line)
        if "failure" in answer:
            raise AssertionError(f"rank {rank} failed in {case}\n{answer['failure']}")
        return answer["result"]

    def _log(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}-{self._num_starts}.log"

    def _tail(self, rank: int) -> str:
        return self._log(rank).read_text()[-2000:]


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ValueError("the process was started without this pipe")
    return pipe


def _read_lines(pipe: IO[str], lines: queue.Queue[str | None]) -> None:
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put(None)


def _find_case(cases: str, case: str) -> Callable[..., object]:
    beside, _, name = case.rpartition(".")
    module = f"{cases.rpartition('.')[0]}.{beside}" if beside else cases
    found: Callable[..., object] = getattr(importlib.import_module(module), name)
    return found


def serve(cases: str, rank: int, world_size: int, rendezvous: str) -> None:
    """Body of one rank: run cases until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a library prints goes to the log, not among the answers.
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    for line in sys.stdin:
        try:
            case, *arguments = json.loads(line)
            answer = {"result": _find_case(cases, case)(*arguments)}
        except Exception:  # noqa: BLE001  # the test process reports it
            answer = {"failure": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
