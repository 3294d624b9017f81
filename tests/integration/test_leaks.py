"""Connecting and disconnecting, over and over, between real processes: nothing may pile up.

``--cycles 1000`` runs the full count; the default is enough to see anything that grows with every cycle.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import ray
import torch

from rdt_core import WeightSubscriber
from rdt_core.subscriber import ConnectRequest
from tests.integration.toy_engine import ToyEngineModel, ToyModel, fingerprint
from tests.integration.toy_trainer import start_trainers
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

SHARED_MEMORY = Path("/dev") / "shm"
WARM_UP_CYCLES = 5
MAX_GROWN_HANDLES = 4
SLACK_NBYTES = 16 * 2**20
MAX_NBYTES_A_CYCLE = 40 * 2**10
"""Ray keeps some kilobytes about every object it has seen (10 measured)."""


@dataclass(frozen=True)
class Holdings:
    """What one process holds."""

    num_fds: int
    num_threads: int
    num_shared: int
    resident_nbytes: int


def look_at(process: psutil.Process) -> Holdings:
    """What a process holds now."""
    gc.collect()
    mapped = [Path(entry.path) for entry in process.memory_maps()]
    num_shared = len({path for path in mapped if path.is_relative_to(SHARED_MEMORY)})
    return Holdings(process.num_fds(), process.num_threads(), num_shared, process.memory_info().rss)


def grew(before: Sequence[Holdings], after: Sequence[Holdings], num_cycles: int) -> list[str]:
    """What grew in which process; trainer ranks come after the engine."""
    found = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        for name in ("num_fds", "num_threads", "num_shared"):
            grown = getattr(new, name) - getattr(old, name)
            if grown > MAX_GROWN_HANDLES:
                found.append(f"process {index}: {name} by {grown}")
        grown = new.resident_nbytes - old.resident_nbytes
        if grown > SLACK_NBYTES + num_cycles * MAX_NBYTES_A_CYCLE:
            found.append(f"process {index}: {grown} bytes")
    return found


def test_nothing_grows_with_the_number_of_connects(
    ray_cluster: str, group: str, pytestconfig: pytest.Config
) -> None:
    assert ray_cluster
    num_cycles = int(pytestconfig.getoption("--cycles", default=25))
    ranks = start_trainers(2)
    pids = ray.get([rank.attach.remote(group) for rank in ranks], timeout=120)
    processes = [psutil.Process(), *map(psutil.Process, pids)]
    model = ToyModel(100, torch.float32)
    subscriber = WeightSubscriber(ToyEngineModel(model))

    def cycle() -> None:
        subscriber.connect(ConnectRequest(group=group, engine="http://a"))
        subscriber.disconnect()

    for _ in range(WARM_UP_CYCLES):
        cycle()
    before = [look_at(process) for process in processes]
    for _ in range(num_cycles):
        cycle()
    wait_for(lambda: not grew(before, [look_at(process) for process in processes], num_cycles), 30.0)
    empty = fingerprint(model)
    subscriber.connect(ConnectRequest(group=group, engine="http://a"))
    ray.get([rank.write.remote(1) for rank in ranks], timeout=120)
    ray.get([rank.publish.remote(1) for rank in ranks], timeout=120)
    subscriber._connected("test").client.wait_published(1, 60.0)
    subscriber.prepare(1)
    subscriber.commit(1)
    assert fingerprint(model) != empty
    subscriber.disconnect()
    for rank in ranks:
        ray.kill(rank)
