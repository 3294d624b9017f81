"""Joining a cluster, as the ranks of an engine do it."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from contextlib import ExitStack

SEED = 7
# Says which random number is next, and then, when asked, how often the thread that waits for the cluster's
# errors has been woken: once a poll, and a poll lasts until there is an error.
RANK = """
import random, sys, threading
from pathlib import Path
from rdt_core.ray_session import RayAddress, join
random.seed(int(sys.argv[2]))
join(RayAddress(sys.argv[1]))
print(random.random(), flush=True)
(waits,) = [thread for thread in threading.enumerate() if thread.name == "ray_listen_error_messages"]
sys.stdin.readline()
status = Path(f"/proc/self/task/{waits.native_id}/status").read_text()
counts = dict(line.split(":") for line in status.splitlines())
print(counts["voluntary_ctxt_switches"], flush=True)
"""


def test_ranks_of_one_seed_do_not_end_each_others_polls_and_keep_their_random_numbers(
    ray_cluster: str,
) -> None:
    command = [sys.executable, "-c", RANK, ray_cluster, str(SEED)]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(2)
        ]
        for rank in ranks:
            stack.callback(rank.kill)
        joined = [rank.stdout.readline() for rank in ranks if rank.stdout]
        time.sleep(1.0)  # in which subscriptions of one name are woken a thousand times
        said = [rank.communicate("\n", timeout=30)[0] for rank in ranks]
    assert [float(line) for line in joined] == [random.Random(SEED).random()] * 2  # noqa: S311  not a secret
    assert max(int(count) for count in said) < 100
