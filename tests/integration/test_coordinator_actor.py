"""The coordinator as an actor: its share of the CPU, and one that another version of rdt-core has started."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from rdt_core.client import RayChannel, actor_name
from rdt_core.errors import DeadlineError, NotPublishedError, VersionSkewError
from rdt_core.ray_session import NAMESPACE
from tests.local_ray import CALL_TIMEOUT_S


class Other:
    """Has none of the methods that this version calls, and another ``leave``."""

    def leave(self, engine: str) -> None:
        """Takes one argument fewer."""


def _niceness(_: Any) -> set[int]:
    """Of every thread of the process that this runs in."""
    threads = Path("/proc/self/task").iterdir()
    return {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads}


@pytest.mark.parametrize("call", [("topology",), ("leave", "engine", 0)])
def test_a_coordinator_of_another_version_is_refused_by_name(
    ray_cluster: str, group: str, call: tuple[object, ...]
) -> None:
    assert ray_cluster
    where = {"name": actor_name(group), "namespace": NAMESPACE, "num_cpus": 0}
    other = ray.remote(Other).options(**where).remote()
    method, *args = call
    with pytest.raises(VersionSkewError, match="one version of rdt-core"):
        RayChannel.find(group).call(str(method), *args, timeout_s=CALL_TIMEOUT_S)
    ray.kill(other)


def test_a_first_call_of_a_coordinator_that_stands_still_ends_in_its_own_time(
    ray_cluster: str, group: str
) -> None:
    assert ray_cluster
    channel = RayChannel.create(group)
    channel.call("session", timeout_s=CALL_TIMEOUT_S)
    actor = ray.get_actor(actor_name(group), namespace=NAMESPACE)
    pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=CALL_TIMEOUT_S)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineError, match="open_line") as caught:
            channel.call("check_version", 1, timeout_s=0.5)
        assert caught.value.waited_s <= 0.5
    finally:
        os.kill(pid, signal.SIGCONT)
    with pytest.raises(NotPublishedError):
        channel.call("check_version", 1, timeout_s=CALL_TIMEOUT_S)
    channel.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="leaving the niceness of Ray's workers takes root")
def test_the_coordinator_has_the_usual_share_of_a_busy_cpu(ray_cluster: str, group: str) -> None:
    assert ray_cluster
    channel = RayChannel.create(group)
    channel.call("session", timeout_s=CALL_TIMEOUT_S)
    actor = ray.get_actor(actor_name(group), namespace=NAMESPACE)
    try:
        assert ray.get(actor.__ray_call__.remote(_niceness), timeout=CALL_TIMEOUT_S) == {0}
    finally:
        channel.end()


def test_a_call_is_answered_beside_more_held_open_than_ray_runs_by_default(
    ray_cluster: str, group: str
) -> None:
    assert ray_cluster
    channel = RayChannel.create(group)
    channel.call("attach", 0, 2, "instance", b"", timeout_s=CALL_TIMEOUT_S)
    # Rank 1 never attaches, so that these wait as the requests for tasks of a thousand trainer ranks do.
    held_open = [channel.start("manifests", 10 * CALL_TIMEOUT_S) for _ in range(1_100)]
    assert channel.call("session", timeout_s=CALL_TIMEOUT_S)
    del held_open
    channel.end()
