"""Joining a cluster, as the ranks of an engine do it."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil

from tests.integration.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

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
# A cluster that can be killed: another than that of this test process.
CLUSTER = """
import sys
from tests.local_ray import local_ray
with local_ray() as address:
    print(address, flush=True)
    sys.stdin.readline()
"""


def test_ranks_of_one_seed_do_not_end_each_others_polls_and_keep_their_random_numbers(
    ray_cluster: str,
) -> None:
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(rank_in(ray_cluster)) for _ in range(2)]
        joined = [read_line(rank) for rank in ranks]
        time.sleep(1.0)  # in which subscriptions of one name are woken a thousand times
        woken = [count_polls(rank) for rank in ranks]
    assert [float(line) for line in joined] == [random.Random(SEED).random()] * 2  # noqa: S311  not a secret
    assert max(woken) < 100


def test_a_rank_whose_cluster_is_gone_does_not_spin() -> None:
    with process_of(CLUSTER) as cluster, rank_in(read_line(cluster).strip()) as rank:
        read_line(rank)
        for process in psutil.Process(cluster.pid).children(recursive=True):
            process.kill()
        before = cpu_seconds(rank)
        time.sleep(3.0)  # in which a thread that asks again at once takes 3 s of a core
        assert cpu_seconds(rank) - before < 0.3


@contextlib.contextmanager
def process_of(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is talked to by lines, and ended."""
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def rank_in(address: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """A process that joins the cluster."""
    return process_of(RANK, address, str(SEED))


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline()


def cpu_seconds(rank: subprocess.Popen[str]) -> float:
    """That it has used."""
    used = psutil.Process(rank.pid).cpu_times()
    return float(used.user + used.system)


def count_polls(rank: subprocess.Popen[str]) -> int:
    """How often a rank's thread has been woken; the rank ends."""
    said, _ = rank.communicate("\n", timeout=30)
    return int(said)
