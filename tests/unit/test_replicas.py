"""From which replica an engine rank reads: few links, and nobody read much more than the others."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.manifest import Shard
from rdt_core.models.parameter import build_manifest
from rdt_core.models.preset import load_preset
from rdt_core.models.specs import ENGINES, TRAINERS, make_engine, make_trainer, parse_spec
from rdt_core.models.units import describe_model
from rdt_core.plan_summary import PlanSummary, imbalance
from rdt_core.planner import build_plan_from
from rdt_core.region import Region
from rdt_core.replicas import Option, Reader, choose_replicas
from rdt_core.sources import Holder, SourceIndex

NUM_RANKS = 6


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor by size, and the ranks that hold it."""

    nbytes: int
    ranks: frozenset[int]


def options_of(tensors: list[Tensor]) -> list[Option]:
    return [
        Option([holder(index, rank) for rank in sorted(tensor.ranks)], tensor.nbytes)
        for index, tensor in enumerate(tensors)
    ]


def holder(index: int, rank: int) -> Holder:
    shard = Shard(
        tensor=str(index),
        region=Region((0,), (1,)),
        window=str(index),
        offset_bytes=0,
        stride_bytes=(1,),
        dtype="uint8",
    )
    return Holder(rank, shard)


def loads_of(tensors: list[Tensor], engine_rank: int = 0) -> Counter[int]:
    options = options_of(tensors)
    reader = Reader(node="here", rank=engine_rank, world_size=1)
    chosen = choose_replicas(options, dict.fromkeys(range(NUM_RANKS), "far"), reader)
    loads: Counter[int] = Counter()
    for option, found in zip(options, chosen, strict=True):
        assert found in option.holders
        loads[found.trainer_rank] += option.nbytes
    return loads


def test_what_is_small_is_read_where_something_is_read_anyway() -> None:
    experts = [Tensor(1000, frozenset({rank})) for rank in (1, 4)]
    norms = [Tensor(2, frozenset(range(NUM_RANKS)))] * 10
    for engine_rank in range(NUM_RANKS):
        assert loads_of([*norms, *experts], engine_rank) == {1: 1010, 4: 1010}


def test_what_is_large_takes_a_link_of_its_own() -> None:
    expert, head = Tensor(1000, frozenset({1})), Tensor(600, frozenset(range(NUM_RANKS)))
    loads = loads_of([expert, head])
    assert sorted(loads.values()) == [600, 1000]


def test_without_a_choice_the_order_of_tensors_decides_nothing() -> None:
    tensors = [Tensor(size, frozenset(range(NUM_RANKS))) for size in (1, 60, 7, 60, 3, 60)]
    assert loads_of(tensors) == loads_of([*reversed(tensors)])


ANY = frozenset(range(NUM_RANKS))
drawn_tensors = st.lists(
    st.builds(
        Tensor,
        st.integers(1, 1000),
        st.sampled_from([ANY, frozenset({0}), frozenset({1}), frozenset({5})]),
    ),
    min_size=1,
    max_size=30,
)


@given(drawn_tensors, st.integers(0, 9))
def test_nobody_gives_more_than_an_even_share_and_one_tensor_or_than_it_must(
    tensors: list[Tensor], engine_rank: int
) -> None:
    loads = loads_of(tensors, engine_rank)
    total = sum(tensor.nbytes for tensor in tensors)
    assert sum(loads.values()) == total
    must = Counter[int]()
    for tensor in tensors:
        if len(tensor.ranks) == 1:
            must[min(tensor.ranks)] += tensor.nbytes
    largest = max((tensor.nbytes for tensor in tensors if tensor.ranks == ANY), default=0)
    most = max(total / NUM_RANKS + largest, *must.values(), 0)
    assert max(loads.values()) <= 1.05 * most


@pytest.mark.parametrize(
    ("trainer", "engine", "most_links"),
    [
        ("megatron:tp=2,cp=4,ep=8", "vllm:tp=2,dp=4,ep", 3),
        ("megatron:tp=4,pp=2,ep=8,dp=2", "sglang:tp=8,ep=8", 6),
    ],
)
def test_an_expert_parallel_engine_has_few_links_and_reads_evenly(
    trainer: str, engine: str, most_links: int
) -> None:
    config = dataclasses.replace(load_preset("qwen3-30b-a3b").config, layers=8)
    model = describe_model(config)
    held = make_trainer(parse_spec(trainer, TRAINERS), model)
    served = make_engine(parse_spec(engine, ENGINES), model)
    sources = SourceIndex([build_manifest(held, rank, f"t{rank}") for rank in range(held.world_size)])
    summary = PlanSummary()
    for rank in range(served.world_size):
        manifest = build_manifest(served, rank, "one node of engine ranks")
        summary.add(manifest, build_plan_from(manifest, sources))
    assert max(len(total.by_trainer) for total in summary.ranks) <= most_links
    assert imbalance(summary.egress(held.world_size)) < 0.1
