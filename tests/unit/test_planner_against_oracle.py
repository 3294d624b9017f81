"""The plan, carried out byte by byte over random worlds, fills every engine parameter and nothing else."""

from __future__ import annotations

import itertools
import operator
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdt_core import row_blocks
from rdt_core.arena import ARENA_WINDOW, place_items
from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import row_major_strides
from rdt_core.lowering import LANDING_ALIGNMENT_BYTES
from rdt_core.planner import build_plan, build_plan_from
from rdt_core.sources import SourceIndex
from tests.unit import oracle
from tests.unit.strategies import COSTS, World, worlds

costs = st.sampled_from(COSTS)


@pytest.fixture(autouse=True, scope="module")
def _narrow_rows() -> Iterator[None]:
    """The worlds of these tests are small: rows of any size are worth the name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_blocks, "MIN_ROW_NBYTES", 1)
        yield


if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from rdt_core.read_method import ReadCost


@given(worlds(), costs)
@settings(max_examples=300)
def test_every_engine_byte_gets_its_value_and_no_other_byte_is_touched(world: World, cost: ReadCost) -> None:
    held = {manifest.rank: oracle.fill_windows(world, manifest) for manifest in world.trainers}
    for engine in world.engines:
        plan = build_plan(engine, world.trainers, cost=cost)
        landing = oracle.run_reads(plan, world.trainers, held)
        assert oracle.run_copies(plan, engine, landing) == oracle.fill_windows(world, engine)


@given(worlds(), costs)
def test_no_byte_of_a_range_is_read_twice_and_ranges_that_touch_are_one_read(
    world: World, cost: ReadCost
) -> None:
    for engine in world.engines:
        for reads in build_plan(engine, world.trainers, cost=cost).reads.values():
            key = operator.attrgetter("window", "offset_bytes")
            boxes = [read for read in reads if read.num_rows > 1]
            ranges = [read for read in reads if read.num_rows == 1]
            assert list(reads) == [*sorted(ranges, key=key), *boxes]
            assert len({(read.window, read.source) for read in boxes}) == len(boxes)
            for one, other in itertools.pairwise(ranges):
                if one.window == other.window == ARENA_WINDOW:
                    assert one.offset_bytes + one.nbytes <= other.offset_bytes
                elif one.window == other.window:
                    assert one.offset_bytes + one.nbytes < other.offset_bytes


@given(worlds(), costs)
def test_reads_land_in_order_with_the_alignment_of_their_source(world: World, cost: ReadCost) -> None:
    for engine in world.engines:
        plan = build_plan(engine, world.trainers, cost=cost)
        assert list(plan.reads) == sorted(plan.reads)
        end = 0
        for read in itertools.chain.from_iterable(plan.reads.values()):
            assert end <= read.landing_offset_bytes < end + LANDING_ALIGNMENT_BYTES
            is_aligned = (read.landing_offset_bytes - read.offset_bytes) % LANDING_ALIGNMENT_BYTES == 0
            assert is_aligned or read.num_rows > 1
            end = read.landing_offset_bytes + read.nbytes
        assert plan.landing_nbytes == end


@given(worlds(), costs)
def test_the_payload_is_what_the_copies_take_each_byte_counted_once(world: World, cost: ReadCost) -> None:
    for engine in world.engines:
        plan = build_plan(engine, world.trainers, cost=cost)
        assert plan.payload_nbytes == oracle.count_used_landing_bytes(plan)
        assert plan.payload_nbytes <= plan.read_nbytes
        assert plan.num_tensors == len({copy.tensor for copy in plan.copies})


@given(worlds(), costs.filter(lambda cost: cost.arenas == "never"))
def test_without_arenas_the_payload_does_not_depend_on_prices(world: World, cost: ReadCost) -> None:
    engine = world.engines[0]
    exact = build_plan(engine, world.trainers, cost=COSTS[1])
    assert exact.payload_nbytes == build_plan(engine, world.trainers, cost=cost).payload_nbytes


@given(worlds(), costs, st.randoms(use_true_random=False))
def test_a_plan_does_not_depend_on_the_order_of_trainers(
    world: World, cost: ReadCost, random: Random
) -> None:
    for engine in world.engines:
        plan = build_plan(engine, world.trainers, cost=cost)
        shuffled = list(world.trainers)
        random.shuffle(shuffled)
        again = build_plan(engine, shuffled, cost=cost)
        assert again == plan
        assert list(again.reads) == list(plan.reads)


@given(worlds())
def test_one_index_of_trainers_plans_every_engine_rank_alike(world: World) -> None:
    sources = SourceIndex(world.trainers)
    for engine in world.engines:
        assert build_plan_from(engine, sources) == build_plan(engine, world.trainers)


@given(worlds())
def test_an_engine_reads_only_from_its_own_node_when_all_it_needs_is_there(world: World) -> None:
    for engine in world.engines:
        near = [manifest for manifest in world.trainers if manifest.node == engine.node]
        plan = build_plan(engine, world.trainers)
        for copy in plan.copies:
            here = {shard.region for m in near for shard in m.shards if shard.tensor == copy.tensor}
            if not any(region.contains(copy.region) for region in here):
                break
        else:
            assert set(plan.reads) <= {manifest.rank for manifest in near}


@given(worlds(), costs)
def test_arenas_hold_only_what_needs_one_and_each_item_once(world: World, cost: ReadCost) -> None:
    for engine in world.engines:
        plan = build_plan(engine, world.trainers, cost=cost)
        assert bool(plan.arena_bytes) == any(copy.method in ("packed", "cast") for copy in plan.copies)
        if cost.arenas == "never":
            assert not plan.arenas
        for rank, items in plan.arenas.items():
            assert len(set(items)) == len(items)
            reads = [read for read in plan.reads[rank] if read.window == ARENA_WINDOW]
            assert [read.offset_bytes for read in reads] == place_items(items)[0]
            assert [read.nbytes for read in reads] == [item.nbytes for item in items]
            for item in items:
                dense = row_major_strides(item.shape, itemsize_bytes(item.source_dtype))
                assert item.stride_bytes != dense or item.dtype != item.source_dtype
