"""What describing a trainer rank costs, against the number of its parameters: seconds and memory.

    python benchmarks/attach.py --json benchmarks/results/attach-cpu.json

Every size is measured in a process of its own: the exporter on a module of that many small parameters, the
manifest, its bytes on the wire, the address check of a ``publish`` beside what it would take one by one, and
whole publishes to a coordinator in the same process (the way to one in Ray is in ``benchmarks/sync.py``).
"""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from by_size import run_by_size
from torch import nn

from rdt_core import WeightPublisher
from rdt_core.client import LocalChannel
from rdt_core.describe import describe_trainer
from rdt_core.wire import manifest_to_bytes
from rdt_megatron import fsdp_shards

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdt_core.local_shards import LocalShards
    from rdt_megatron.places import Places

SIZES = (300, 1_000, 10_000, 30_000, 100_000)


def measure(num_parameters: int) -> dict[str, Any]:
    """One row: CPU seconds of this process by phase, and how far its resident memory grew."""
    model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(num_parameters)])
    before_bytes = resident_bytes()
    began_s = time.process_time()
    local = fsdp_shards(model)
    exported_s = time.process_time()
    described = describe_trainer(local)
    described_s = time.process_time()
    wire = manifest_to_bytes(described.manifest)
    packed_s = time.process_time()
    grown_bytes = resident_bytes() - before_bytes
    return {
        "num_parameters": num_parameters,
        "export_s": exported_s - began_s,
        "describe_s": described_s - exported_s,
        "wire_s": packed_s - described_s,
        "attach_s": packed_s - began_s,
        "address_check_s": least_s(local.locate),
        "one_by_one_s": least_s(cast("Places", local.locate).find_each),
        "memory_bytes": grown_bytes,
        "manifest_bytes": len(wire),
        "publish_ms": measure_publish(local),
    }


def least_s(act: Callable[[], object]) -> float:
    """CPU seconds of the quickest of seven."""
    taken_s = []
    for _ in range(7):
        began_s = time.process_time()
        act()
        taken_s.append(time.process_time() - began_s)
    return min(taken_s)


def measure_publish(local: LocalShards) -> float:
    """Median of 30 publishes without arenas after ten others, in milliseconds of the wall clock."""
    channel = LocalChannel("attach-benchmark")
    with WeightPublisher.attach("attach-benchmark", local, channel=channel) as publisher:
        taken_s = []
        for version in range(1, 41):
            began_s = time.perf_counter()
            publisher.publish(version)
            taken_s.append(time.perf_counter() - began_s)
    channel.end()
    return statistics.median(taken_s[10:]) * 1e3


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    run_by_size("attach", __file__, SIZES, measure, ("rdt-core", "torch"))
