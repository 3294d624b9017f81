"""A network partition: trainers on one Ray node, engines and driver on another, and the link between cut.

Each node has a network namespace of its own, and NIXL is held to TCP, so nothing passes but by the link.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import psutil
import ray

from rdt_core import ray_session
from rdt_core.errors import NoRayClusterError
from tests.faults.faulty_trainer import FaultyTrainer
from tests.faults.namespaces import FAR, LINK, NEAR, two_hosts
from tests.integration.conftest import START_TIMEOUT_S
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.faults.namespaces import FarHost

_PORT = 26379
_RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
_SMALL = ("--num-cpus", "2", "--object-store-memory", str(100 * 2**20))


@contextlib.contextmanager
def two_nodes() -> Iterator[FarHost]:
    """A Ray cluster of two hosts; this process is a driver on the near one, which has the head."""
    os.environ |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": LINK, "RAY_AUTH_TOKEN": secrets.token_hex()}
    with two_hosts() as far, tempfile.TemporaryDirectory(prefix="rdt", dir="/tmp") as folder:
        head = ("--head", "--port", str(_PORT), "--temp-dir", folder, "--include-dashboard", "false")
        near_node = [*_RAY, *head, "--node-ip-address", NEAR, *_SMALL]
        far_node = [*_RAY, "--address", f"{NEAR}:{_PORT}", "--node-ip-address", FAR, *_SMALL]
        far_node += ["--resources", '{"far": 1}']
        with _running(near_node):
            wait_for(_is_joined)
            try:
                with _running(far.command(*far_node)):
                    wait_for(lambda: "far" in ray.cluster_resources())
                    yield far
            finally:
                ray.shutdown()


def far_ranks(world_size: int) -> list[Any]:
    """Trainer ranks on the far node, not yet attached."""
    actor = ray.remote(FaultyTrainer).options(num_cpus=0, resources={"far": 0.1})
    return [actor.remote(rank, world_size) for rank in range(world_size)]


def _is_joined() -> bool:
    with contextlib.suppress(NoRayClusterError):
        ray_session.join(ray_session.RayAddress(f"{NEAR}:{_PORT}", "token"))
        return True
    return False


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[None]:
    """A node's processes, all of which end with it."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as node:
        try:
            yield
        finally:
            whole = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
            for process in whole:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(whole, timeout=START_TIMEOUT_S)
