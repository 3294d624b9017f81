"""What planning one engine rank costs, against the number of shards that it needs: seconds and memory.

    python benchmarks/planner.py --json benchmarks/results/planner.json

Two trainer ranks hold half of the rows of every tensor each, one engine rank wants all of them, so that every
tensor is two reads. Every size is measured in a process of its own, from the manifests' bytes on.
"""

from __future__ import annotations

import resource
import time
from typing import Any

from by_size import run_by_size

from rdt_core.layout import row_major_strides
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.planner import build_plan
from rdt_core.region import Region
from rdt_core.wire import manifest_from_bytes, manifest_to_bytes

SIZES = (1_000, 10_000, 100_000)
ROWS, COLUMNS, DTYPE, ITEMSIZE = 64, 64, "bfloat16", 2


def measure(num_tensors: int) -> dict[str, Any]:
    """One row: CPU seconds of this process by phase, and its peak of resident memory."""
    names = [f"model.layers.{number}.weight" for number in range(num_tensors)]
    half = ROWS // 2
    engine = describe("engine", 0, 1, names, (0, ROWS))
    trainers = [describe("trainer", rank, 2, names, (rank * half, (rank + 1) * half)) for rank in range(2)]
    received = [manifest_to_bytes(manifest) for manifest in trainers]
    began_s = time.process_time()
    parsed = [manifest_from_bytes(data) for data in received]
    parsed_s = time.process_time()
    plan = build_plan(engine, parsed)
    planned_s = time.process_time()
    return {
        "num_shards": num_tensors,
        "parse_s": parsed_s - began_s,
        "plan_s": planned_s - parsed_s,
        "num_reads": plan.num_reads,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def describe(side: str, rank: int, world_size: int, names: list[str], rows: tuple[int, int]) -> Manifest:
    """A manifest of one window and one block of rows a tensor."""
    region = Region((rows[0], 0), (rows[1], COLUMNS))
    return Manifest(
        side=side,
        rank=rank,
        world_size=world_size,
        node="here",
        device="cpu",
        windows={name: Window(name, region.num_elements * ITEMSIZE) for name in names},
        tensors={name: TensorSpec(name, (ROWS, COLUMNS), DTYPE) for name in names},
        shards=tuple(
            Shard(
                tensor=name,
                region=region,
                window=name,
                offset_bytes=0,
                stride_bytes=row_major_strides(region.shape, ITEMSIZE),
                dtype=DTYPE,
            )
            for name in names
        ),
    )


if __name__ == "__main__":
    run_by_size("planner", __file__, SIZES, measure)
