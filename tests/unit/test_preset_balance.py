"""How evenly one engine of every preset reads, at its published layout in full, and over how many links.

Tensors that all ranks hold alike are found once, as the simulator does; which replica each engine rank takes
is asked of the module that the planner asks at connect.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from rdt_core.dtypes import itemsize_bytes
from rdt_core.models.preset import load_preset
from rdt_core.models.specs import ENGINES, TRAINERS, make_engine, make_trainer, parse_spec
from rdt_core.models.units import describe_model
from rdt_core.plan_summary import imbalance, sum_egress
from rdt_core.replicas import Option, Reader, choose_replicas
from rdt_core.simulator.classes import Need, find_classes, find_needs
from rdt_core.sources import Holder

GPUS_PER_NODE = 8


@pytest.mark.parametrize(
    ("preset", "most_links", "most_above_mean"),
    [
        ("qwen3-0.6b", 2, 0.0),
        ("qwen3-30b-a3b", 16, 0.05),
        ("qwen3-235b-a22b", 128, 0.02),
        ("glm-4.5-air", 32, 0.04),
        # The last pipeline stages have fewer layers: no choice of replicas comes below 9.6 and 5.5 %.
        ("deepseek-v3", 242, 0.096),
        ("kimi-k2", 14, 0.056),
    ],
)
def test_trainer_egress_is_even_at_every_published_layout(
    preset: str, most_links: int, most_above_mean: float
) -> None:
    num_trainers, rows = read_by_rank(preset)
    egress = sum_egress(rows)
    assert max(map(len, rows)) <= most_links
    assert imbalance(egress[rank] for rank in range(num_trainers)) <= most_above_mean


def read_by_rank(name: str) -> tuple[int, list[Counter[int]]]:
    """The number of trainer ranks, and what every rank of one engine reads from each of them."""
    preset = load_preset(name)
    model = describe_model(preset.config)
    trainer = make_trainer(parse_spec(preset.trainer, TRAINERS), model, preset.trainer_ranks)
    engine = make_engine(parse_spec(preset.engine, ENGINES), model)
    options: defaultdict[int, list[Option]] = defaultdict(list)
    for found in find_classes(trainer, engine):
        for need in find_needs(found):
            alike = options_of(need)
            for rank in need.needers:
                options[rank] += alike
    nodes = {rank: f"trainer-{rank // GPUS_PER_NODE}" for rank in range(trainer.world_size)}
    rows = []
    for rank in range(engine.world_size):
        reader = Reader(node=f"engine-{rank // GPUS_PER_NODE}", rank=rank, world_size=engine.world_size)
        row: Counter[int] = Counter()
        for option, holder in zip(options[rank], choose_replicas(options[rank], nodes, reader), strict=True):
            row[holder.trainer_rank] += option.nbytes
        rows.append(row)
    return trainer.world_size, rows


def options_of(need: Need) -> list[Option]:
    """One a tensor; one for all where there is nothing to choose."""
    nbytes = need.region.num_elements * itemsize_bytes(need.shard.dtype)
    if len(need.holders) == 1:
        return [Option([Holder(need.holders[0], need.shard)], nbytes * need.num_tensors)]
    shards = [
        replace(need.shard, window=f"{need.shard.window} {tensor}") for tensor in range(need.num_tensors)
    ]
    return [Option([Holder(rank, shard) for rank in need.holders], nbytes) for shard in shards]
