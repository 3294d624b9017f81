"""What the planner refuses, and how it chooses. That plans move the right bytes is the oracle's business."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rdt_core.errors import (
    ConfigError,
    CoverageError,
    DtypeError,
    OverlapError,
    PlanError,
    ShapeError,
    UnknownTensorError,
)
from rdt_core.layout import row_major_strides
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.placement import Placement, Replicate, ShardDim, local_region
from rdt_core.plan import Plan
from rdt_core.planner import ReadCost, build_plan
from rdt_core.region import Region
from tests.unit.oracle import coordinates
from tests.unit.strategies import World, worlds
from tests.unit.worlds_by_hand import NAME, around, box, dense_shard, holding

EXACT = ReadCost(per_read_s=0.0, arenas="never")
SPAN = ReadCost(per_read_s=1.0, max_over_read=1e9, arenas="never")
DIRECT = ReadCost(arenas="never")


def parse(text: str) -> Region:
    pairs = re.findall(r"(\d+):(\d+)", text)
    return Region(tuple(int(a) for a, _ in pairs), tuple(int(b) for _, b in pairs))


def engine_of(*regions: Region, shape: tuple[int, ...], **changes: Any) -> Manifest:
    return holding(*regions, shape=shape, side="engine", **changes)


@given(worlds(), st.data())
def test_a_coverage_error_names_a_region_that_is_needed_and_truly_missing(
    world: World, data: st.DataObject
) -> None:
    held = sorted(
        {
            (s.tensor, s.region.start, s.region.stop)
            for m in world.trainers
            for s in m.shards
            if s.region.num_elements
        }
    )
    assume(held)
    tensor, start, stop = data.draw(st.sampled_from(held))
    lost = Region(start, stop)
    kept = [
        dataclasses.replace(m, shards=tuple(s for s in m.shards if (s.tensor, s.region) != (tensor, lost)))
        for m in world.trainers
    ]
    for engine in world.engines:
        needed = [s.region for s in engine.shards if s.tensor == tensor]
        if not any(region.intersect(lost) for region in needed):
            build_plan(engine, kept)
            continue
        with pytest.raises(CoverageError) as caught:
            build_plan(engine, kept)
        missing = parse(caught.value.needed)
        assert (caught.value.tensor, caught.value.engine_rank) == (tensor, engine.rank)
        assert missing.num_elements > 0
        assert lost.contains(missing)
        assert any(region.contains(missing) for region in needed)


def test_an_overlap_and_a_gap_of_one_size_do_not_cancel_out() -> None:
    trainers = [holding(box((0, 4)), shape=(8,)), holding(box((2, 6)), shape=(8,), rank=1)]
    with pytest.raises(OverlapError) as caught:
        build_plan(engine_of(box((0, 8)), shape=(8,)), trainers)
    error = caught.value
    assert (error.tensor, error.first, error.second) == (NAME, "[0:4]", "[2:6]")
    assert (error.first_rank, error.second_rank) == (0, 1)


def test_an_overlap_is_refused_even_where_this_engine_rank_does_not_look() -> None:
    trainers = [holding(box((0, 4)), box((4, 7)), shape=(8,)), holding(box((5, 8)), shape=(8,), rank=1)]
    with pytest.raises(OverlapError):
        build_plan(engine_of(box((0, 2)), shape=(8,)), trainers)


def test_a_gap_is_named_by_its_box_and_not_by_the_whole_tensor() -> None:
    trainers = [
        holding(box((0, 4), (0, 8)), shape=(8, 8)),
        holding(box((4, 8), (0, 5)), shape=(8, 8), rank=1),
    ]
    with pytest.raises(CoverageError) as caught:
        build_plan(engine_of(box((2, 8), (0, 8)), shape=(8, 8), rank=3), trainers)
    assert (caught.value.needed, caught.value.engine_rank) == ("[4:8, 5:8]", 3)


def test_trainer_ranks_that_left_a_frozen_tower_out_are_named() -> None:
    tower = "vision_tower.patch_embed.weight"
    trainers = [
        holding(box((0, 4)), shape=(16,), tensor=tower, rank=0),
        around(shapes={}, rank=1),
        holding(box((8, 16)), shape=(16,), tensor=tower, rank=2),
        around(shapes={}, rank=3),
    ]
    with pytest.raises(
        CoverageError, match=r"patch_embed.weight\[4:8\].* without any of it: 1, 3.*frozen"
    ) as caught:
        build_plan(engine_of(box((0, 16)), shape=(16,), tensor=tower), trainers)
    assert caught.value.without == (1, 3)


def test_a_tensor_that_no_trainer_rank_knows_is_named() -> None:
    engine = engine_of(box((0, 4)), shape=(4,), tensor="lm_head.weight", rank=2)
    with pytest.raises(UnknownTensorError) as caught:
        build_plan(engine, [holding(box((0, 4)), shape=(4,))])
    assert (caught.value.tensor, caught.value.engine_rank) == ("lm_head.weight", 2)


def test_a_tensor_that_is_known_but_held_by_nobody_is_missing_whole() -> None:
    trainer = around(shapes={NAME: (4,)})
    with pytest.raises(CoverageError, match=r"\[0:4\]"):
        build_plan(engine_of(box((0, 4)), shape=(4,)), [trainer])


def test_no_trainer_at_all_knows_no_tensor() -> None:
    with pytest.raises(UnknownTensorError):
        build_plan(engine_of(box((0, 4)), shape=(4,)), [])


def test_trainer_ranks_that_disagree_on_a_shape_are_refused_by_rank() -> None:
    trainers = [holding(box((0, 4)), shape=(8,)), holding(box((4, 8)), shape=(9,), rank=5)]
    with pytest.raises(ShapeError) as caught:
        build_plan(engine_of(box((0, 8)), shape=(8,)), trainers)
    assert (caught.value.rank, caught.value.got, caught.value.expected) == (5, "(9,)", "(8,)")


def test_an_engine_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        build_plan(engine_of(box((0, 6)), shape=(6,), rank=1), [holding(box((0, 8)), shape=(8,))])
    assert (caught.value.rank, caught.value.got, caught.value.expected) == (1, "(6,)", "(8,)")


@pytest.mark.parametrize("region", [box((4, 9)), box((0, 8), (0, 1))])
def test_a_region_outside_of_the_shape_is_refused_on_either_side(region: Region) -> None:
    good = holding(box((0, 8)), shape=(8,))
    with pytest.raises(ShapeError):
        build_plan(engine_of(box((0, 8)), shape=(8,)), [good, holding(region, shape=(8,), rank=1)])
    with pytest.raises(ShapeError):
        build_plan(engine_of(region, shape=(8,)), [good])


def test_two_manifests_of_one_rank_are_refused() -> None:
    with pytest.raises(PlanError, match="claim trainer rank 3"):
        build_plan(engine_of(box((0, 4)), shape=(4,)), [holding(box((0, 4)), shape=(4,), rank=3)] * 2)


@pytest.mark.parametrize(
    ("source", "target"), [("int8", "bfloat16"), ("float8_e4m3fn", "float32"), ("int32", "int64")]
)
def test_bytes_without_a_conversion_are_refused(source: str, target: str) -> None:
    with pytest.raises(DtypeError) as caught:
        build_plan(
            engine_of(box((0, 4)), shape=(4,), dtype=target),
            [holding(box((0, 4)), shape=(4,), dtype=source, rank=7)],
        )
    error = caught.value
    assert (error.tensor, error.region, error.source, error.target) == (NAME, "[0:4]", source, target)
    assert error.trainer_rank == 7


def test_a_copy_between_float_sizes_records_both_dtypes_and_strides_of_each() -> None:
    trainer = holding(box((0, 2), (0, 4)), shape=(2, 4), dtype="float32")
    engine = engine_of(box((0, 2), (1, 3)), shape=(2, 4), dtype="bfloat16")
    (copy,) = build_plan(engine, [trainer], cost=EXACT).copies
    assert (copy.source_dtype, copy.target_dtype) == ("float32", "bfloat16")
    assert (copy.landing_stride_bytes[1], copy.target_stride_bytes) == (4, (4, 2))
    assert copy.region == box((0, 2), (1, 3))


def test_a_replica_that_converts_is_preferred_to_one_that_does_not() -> None:
    trainers = [
        holding(box((0, 4)), shape=(4,), dtype="int8"),
        holding(box((0, 4)), shape=(4,), rank=1, node="far"),
    ]
    assert list(build_plan(engine_of(box((0, 4)), shape=(4,)), trainers).reads) == [1]


def test_a_replica_on_the_engines_node_is_preferred() -> None:
    trainers = [holding(box((0, 4)), shape=(4,), rank=rank, node=f"node{rank}") for rank in range(8)]
    for at in range(8):
        plan = build_plan(engine_of(box((0, 4)), shape=(4,), node=f"node{at}"), trainers)
        assert list(plan.reads) == [at]


def replicated(num_tensors: int, **changes: Any) -> Manifest:
    names = [f"layers.{index}.weight" for index in range(num_tensors)]
    shards = [dense_shard(box((0, 64)), tensor=name, window=name, dtype="bfloat16") for name in names]
    return around(*shards, shapes=dict.fromkeys(names, (64,)), **changes)


def test_one_engine_rank_spreads_its_bytes_evenly_over_equally_near_replicas() -> None:
    trainers = [replicated(20, rank=rank, node="far") for rank in range(4)]
    plan = build_plan(replicated(20, side="engine"), trainers)
    assert {rank: sum(read.nbytes for read in reads) for rank, reads in plan.reads.items()} == dict.fromkeys(
        range(4), 5 * 128
    )


def test_engine_ranks_start_at_different_replicas() -> None:
    trainers = [replicated(1, rank=rank, node="far") for rank in range(4)]
    chosen = Counter(
        next(iter(build_plan(replicated(1, side="engine", rank=rank), trainers).reads)) for rank in range(8)
    )
    assert chosen == dict.fromkeys(range(4), 2)


def test_two_engine_shards_of_one_region_read_it_once_from_one_replica() -> None:
    trainers = [holding(box((0, 64)), shape=(64,), rank=rank, node="far") for rank in range(4)]
    engine = around(
        dense_shard(box((0, 64)), window="embed", dtype="bfloat16"),
        dense_shard(box((0, 64)), window="head", dtype="bfloat16"),
        shapes={NAME: (64,)},
        side="engine",
    )
    plan = build_plan(engine, trainers)
    assert (plan.num_reads, plan.read_nbytes, plan.payload_nbytes, len(plan.copies)) == (1, 128, 128, 2)


def test_tied_tensors_of_a_trainer_are_read_once() -> None:
    names = ("lm_head.weight", NAME)
    shards = [dense_shard(box((0, 64)), tensor=name, dtype="bfloat16") for name in names]
    trainers = [around(*shards, shapes=dict.fromkeys(names, (64,)), rank=rank) for rank in range(4)]
    targets = [dense_shard(box((0, 64)), tensor=name, window=name, dtype="bfloat16") for name in names]
    engine = around(*targets, shapes=dict.fromkeys(names, (64,)), side="engine")
    plan = build_plan(engine, trainers)
    assert (plan.num_reads, plan.read_nbytes, plan.payload_nbytes, plan.num_tensors) == (1, 128, 128, 2)


COLUMNS = engine_of(box((0, 4), (2, 4)), shape=(4, 8))
ROWS = holding(box((0, 4), (0, 8)), shape=(4, 8))


def test_columns_are_read_by_run_when_reads_are_free() -> None:
    plan = build_plan(COLUMNS, [ROWS], cost=EXACT)
    assert [(read.offset_bytes, read.nbytes) for read in plan.reads[0]] == [(4, 4), (20, 4), (36, 4), (52, 4)]
    assert plan.payload_nbytes == plan.read_nbytes == 16


def test_runs_land_packed_and_the_copy_knows_their_new_distance() -> None:
    engine = engine_of(box((0, 4), (2, 4)), shape=(4, 64))
    plan = build_plan(engine, [holding(box((0, 4), (0, 64)), shape=(4, 64))], cost=EXACT)
    assert [read.landing_offset_bytes for read in plan.reads[0]] == [4, 20, 36, 52]
    assert plan.copies[0].landing_offset_bytes == 4
    assert plan.copies[0].landing_stride_bytes == (16, 2)


def test_columns_are_read_as_one_span_when_reads_are_dear() -> None:
    plan = build_plan(COLUMNS, [ROWS], cost=SPAN)
    assert [(read.offset_bytes, read.nbytes) for read in plan.reads[0]] == [(4, 52)]
    assert plan.copies[0].landing_stride_bytes == (16, 2)
    assert (plan.payload_nbytes, plan.read_nbytes) == (16, 52)


def test_the_allowed_over_read_wins_over_the_price() -> None:
    dear = ReadCost(per_read_s=1.0, max_over_read=3.0, arenas="never")
    assert build_plan(COLUMNS, [ROWS], cost=dear).num_reads == 4
    assert build_plan(COLUMNS, [ROWS], cost=dataclasses.replace(dear, max_over_read=3.25)).num_reads == 1


def test_without_arenas_narrow_gaps_are_read_over_and_wide_ones_are_not() -> None:
    # One read costs as much as 10 kB on the link.
    for width, expected in ((4096, 1), (16384, 64)):
        trainer = holding(box((0, 64), (0, width)), shape=(64, width))
        engine = engine_of(box((0, 64), (0, width // 4)), shape=(64, width))
        assert build_plan(engine, [trainer], cost=DIRECT).num_reads == expected


def test_columns_of_two_engine_shards_that_touch_become_one_read() -> None:
    engine = around(
        dense_shard(box((0, 4), (0, 3)), window="a", dtype="bfloat16"),
        dense_shard(box((0, 4), (3, 8)), window="b", dtype="bfloat16"),
        shapes={NAME: (4, 8)},
        side="engine",
    )
    plan = build_plan(engine, [ROWS], cost=EXACT)
    assert [(read.offset_bytes, read.nbytes) for read in plan.reads[0]] == [(0, 64)]
    assert [copy.landing_stride_bytes for copy in plan.copies] == [(16, 2), (16, 2)]


def test_runs_that_land_unevenly_are_read_as_a_span() -> None:
    # The second shard needs two of the four rows whole: the first one's runs land 32 and 16 bytes apart.
    engine = around(
        dense_shard(box((0, 4), (2, 4)), window="a", dtype="bfloat16"),
        dense_shard(box((0, 2), (0, 16)), window="b", dtype="bfloat16"),
        shapes={NAME: (4, 16)},
        side="engine",
    )
    plan = build_plan(engine, [holding(box((0, 4), (0, 16)), shape=(4, 16))], cost=EXACT)
    assert [(read.offset_bytes, read.nbytes) for read in plan.reads[0]] == [(0, 104)]
    assert plan.copies[0].landing_stride_bytes == (32, 2)


def test_an_empty_engine_shard_needs_nothing() -> None:
    plan = build_plan(engine_of(Region((4,), (4,)), shape=(4,)), [around(shapes={NAME: (4,)})])
    assert (plan.reads, plan.copies, plan.landing_nbytes) == ({}, (), 0)


def test_an_engine_rank_without_shards_gets_an_empty_plan() -> None:
    assert build_plan(around(shapes={}, side="engine", rank=3), [ROWS]) == Plan(engine_rank=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes_per_s": 0.0},
        {"per_read_s": -1.0},
        {"max_over_read": 0.5},
        {"bytes_per_s": float("nan")},
        {"arenas": "sometimes"},
    ],
)
def test_prices_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ReadCost(**changes)  # type: ignore[arg-type]  # what a caller without a type checker may pass


def rank_of_mesh(
    side: str, mesh: tuple[int, ...], at: tuple[int, ...], placements: tuple[Placement, ...], names: list[str]
) -> Manifest:
    shape, rank = (1024, 1024), sum(i * n for i, n in zip(at, (*mesh[1:], 1), strict=True))
    region = local_region(shape, mesh, at, placements)
    strides = row_major_strides(region.shape, 2)
    return Manifest(
        side=side,
        rank=rank,
        world_size=mesh[0] * mesh[1],
        node=f"node{rank // 8}",
        device="cuda:0",
        windows={name: Window(name, 2 * region.num_elements) for name in names},
        tensors={name: TensorSpec(name, shape, "bfloat16") for name in names},
        shards=tuple(
            Shard(
                tensor=name,
                region=region,
                window=name,
                offset_bytes=0,
                stride_bytes=strides,
                dtype="bfloat16",
            )
            for name in names
        ),
    )


def test_an_engine_rank_of_a_large_group_is_planned_in_seconds() -> None:
    names = [f"layers.{index}.weight" for index in range(500)]
    trainers = [
        rank_of_mesh("trainer", (4, 32), at, (Replicate(), ShardDim(0)), names)
        for at in itertools.product(range(4), range(32))
    ]
    engine = rank_of_mesh("engine", (1, 8), (0, 3), (Replicate(), ShardDim(1)), names)
    began = time.process_time()
    plan = build_plan(engine, trainers)
    # 64,000 trainer shards, 16,000 copies; comparing every pair of them would take minutes.
    assert time.process_time() - began < 20.0
    assert len(plan.copies) == 16_000
    assert plan.payload_nbytes == engine.nbytes


def test_ten_thousand_shards_of_one_tensor_meet_each_other_without_comparing_all_pairs() -> None:
    def rows(side: str, num_shards: int, height: int) -> Manifest:
        shape = (num_shards * height, 8)
        regions = [box((i * height, (i + 1) * height), (0, 8)) for i in range(num_shards)]
        return holding(*regions, shape=shape, side=side)

    began = time.process_time()
    plan = build_plan(rows("engine", 6_000, 5), [rows("trainer", 10_000, 3)])
    assert time.process_time() - began < 10.0
    assert len(plan.copies) == 14_000
    assert (plan.num_reads, plan.read_nbytes) == (1, 30_000 * 16)


def test_every_engine_element_is_copied_exactly_once() -> None:
    trainers = [
        holding(box((0, 4), (0, 8)), shape=(8, 8)),
        holding(box((4, 8), (0, 8)), shape=(8, 8), rank=1),
    ]
    engine = engine_of(box((2, 8), (1, 5)), shape=(8, 8))
    copied = Counter(
        itertools.chain.from_iterable(coordinates(c.region) for c in build_plan(engine, trainers).copies)
    )
    assert copied == Counter(coordinates(box((2, 8), (1, 5))))
