"""The table of PyTorch's shardings in docs/trainers.md: ``python -m tests.integration.page`` writes it anew.

How engines read a configuration is asked of the planner, for one large matrix as the ranks hold it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import row_major_strides
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.placement import local_region
from rdt_core.planner import build_plan
from rdt_core.region import Region
from tests.integration.shardings import REFUSED, SHARDINGS

if TYPE_CHECKING:
    from tests.integration.shardings import Sharding

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
BEGIN, END = "<!-- begin: written by tests/integration/page.py -->", "<!-- end -->"

_SHAPE = (4096, 4096)
_NAME = "weight"
# What an engine rank keeps of the matrix, and in which dtype; None is the trainer's.
_WANTED: dict[str, tuple[Region, str | None]] = {
    "rows, same dtype": (Region((0, 0), (1024, 4096)), None),
    "rows, bfloat16": (Region((0, 0), (1024, 4096)), "bfloat16"),
    "columns": (Region((0, 0), (4096, 1024)), None),
}


def make_table() -> str:
    """The table, as Markdown."""
    rows = []
    for name, sharding in SHARDINGS.items():
        methods = " | ".join(how_read(sharding, *wanted) for wanted in _WANTED.values())
        rows.append(f"| {name} | {sharding.holds} | {methods} | {sharding.proof} |")
    refused = [f"| {what} | refused |{' |' * (len(_WANTED) + 1)}" for what in REFUSED]
    return "\n".join(
        [
            f"| configuration | a rank exports | an engine's {' | '.join(_WANTED)} | compared with |",
            "|---|---|" + "---|" * len(_WANTED) + "---|",
            *rows,
            *refused,
        ]
    )


def how_read(sharding: Sharding, needed: Region, dtype: str | None) -> str:
    """The methods of the plan's copies: ``direct``, ``cast``, ``packed``, ..."""
    ranks = list(itertools.product(*map(range, sharding.mesh)))
    held = [local_region(_SHAPE, sharding.mesh, at, sharding.placements) for at in ranks]
    trainers = [
        _manifest("trainer", rank, len(ranks), region, sharding.dtype) for rank, region in enumerate(held)
    ]
    engine = _manifest("engine", 0, 1, needed, dtype or sharding.dtype)
    return ", ".join(sorted({copy.method for copy in build_plan(engine, trainers).copies}))


def _manifest(side: str, rank: int, world_size: int, region: Region, dtype: str) -> Manifest:
    itemsize = itemsize_bytes(dtype)
    shard = Shard(
        tensor=_NAME,
        region=region,
        window=_NAME,
        offset_bytes=0,
        stride_bytes=row_major_strides(region.shape, itemsize),
        dtype=dtype,
    )
    return Manifest(
        side=side,
        rank=rank,
        world_size=world_size,
        node="here",
        device="cpu",
        windows={_NAME: Window(_NAME, region.num_elements * itemsize)},
        tensors={_NAME: TensorSpec(_NAME, _SHAPE, dtype)},
        shards=(shard,),
    )


def put_into(page: str) -> str:
    """The page with the table between its marks made anew."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END, 1)
    return f"{head}{BEGIN}\n{make_table()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(put_into(PAGE.read_text()))
