"""Reads aimed at parameters bring the same bytes as reads into landing memory, with less of it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdt_core import row_blocks
from rdt_core.arena import ARENA_WINDOW
from rdt_core.direct import aim_directly
from rdt_core.dtypes import ITEMSIZE_BYTES
from rdt_core.lowering import LANDING_ALIGNMENT_BYTES
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.planner import build_plan
from rdt_core.read_method import ReadCost
from rdt_core.region import Region
from rdt_core.row_blocks import Rows
from tests.unit import oracle
from tests.unit.strategies import COSTS, ROWS, World, worlds
from tests.unit.worlds_by_hand import box, holding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_core.plan import Plan

costs = st.sampled_from(COSTS)


def run_direct(
    plan: Plan, held: dict[int, dict[str, bytearray]], windows: dict[str, bytearray]
) -> Counter[tuple[str, int]]:
    """Carry out the direct reads; returns how often each engine byte was written."""
    written: Counter[tuple[str, int]] = Counter()
    for rank, reads in plan.direct.items():
        for read in reads:
            assert read.trainer_rank == rank
            source, target = held[rank][read.window], windows[read.target_window]
            for at, into in zip(oracle.offsets_of(read.source), oracle.offsets_of(read.target), strict=True):
                target[into] = source[at]
                written[read.target_window, into] += 1
    return written


@pytest.fixture(autouse=True, scope="module")
def _narrow_rows() -> Iterator[None]:
    """The worlds of these tests are small: rows of any size are worth the name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_blocks, "MIN_ROW_NBYTES", 1)
        yield


def aim(staged: Plan, cost: ReadCost) -> Plan:
    """With every window open to reads."""
    return aim_directly(staged, may_write=lambda _: True, takes_rows=lambda rank: cost.of(rank).takes_rows)


@given(worlds(), costs)
@settings(max_examples=300)
def test_aimed_reads_and_the_copies_left_fill_every_engine_byte_once(world: World, cost: ReadCost) -> None:
    held = {manifest.rank: oracle.fill_windows(world, manifest) for manifest in world.trainers}
    for engine in world.engines:
        staged = build_plan(engine, world.trainers, cost=cost)
        plan = aim(staged, cost)
        windows = oracle.run_copies(plan, engine, oracle.run_reads(plan, world.trainers, held))
        copied = {
            (copy.window, offset + byte)
            for copy in plan.copies
            for offset in oracle.target_offsets(copy)
            for byte in range(ITEMSIZE_BYTES[copy.target_dtype])
        }
        written = run_direct(plan, oracle.with_arenas(plan, held), windows)
        assert not written or max(written.values()) == 1
        assert not copied & written.keys()
        assert windows == oracle.fill_windows(world, engine)


@given(worlds(), costs)
def test_aiming_changes_no_byte_on_the_link_and_only_shrinks_the_landing_memory(
    world: World, cost: ReadCost
) -> None:
    for engine in world.engines:
        staged = build_plan(engine, world.trainers, cost=cost)
        plan = aim(staged, cost)
        assert plan.read_nbytes == staged.read_nbytes
        assert plan.trainer_ranks == staged.trainer_ranks
        assert plan.landing_nbytes <= staged.landing_nbytes
        for reads in plan.reads.values():
            for read in reads:
                is_aligned = (read.landing_offset_bytes - read.offset_bytes) % LANDING_ALIGNMENT_BYTES == 0
                assert is_aligned or read.num_rows > 1


@given(worlds(), costs)
def test_a_window_that_must_not_be_written_by_reads_is_not(world: World, cost: ReadCost) -> None:
    for engine in world.engines:
        staged = build_plan(engine, world.trainers, cost=cost)
        plan = aim_directly(staged, may_write=lambda _: False)
        assert not plan.direct
        assert (plan.reads, plan.copies, plan.landing_nbytes) == (
            staged.reads,
            staged.copies,
            staged.landing_nbytes,
        )


def fused_world(source_dtype: str) -> tuple[Manifest, Manifest]:
    """q, k, v of one trainer rank, each [4, 8], into one fused fp32 window, and a column block beside."""
    specs = {name: TensorSpec(name, (4, 8), source_dtype) for name in ("q", "k", "v", "down")}
    size = 4 if source_dtype == "float32" else 2

    def shard(name: str, window: str, offset: int, itemsize: int, dtype: str, cols: int = 8) -> Shard:
        region = Region((0, 0), (4, cols))
        return Shard(
            tensor=name,
            region=region,
            window=window,
            offset_bytes=offset,
            stride_bytes=((8 if window != "down.half" else 4) * itemsize, itemsize),
            dtype=dtype,
        )

    trainer = Manifest(
        side="trainer",
        rank=0,
        world_size=1,
        node="n",
        device="cpu",
        windows={name: Window(name, 32 * size) for name in specs},
        tensors=specs,
        shards=tuple(shard(name, name, 0, size, source_dtype) for name in specs),
    )
    engine = Manifest(
        side="engine",
        rank=0,
        world_size=1,
        node="n",
        device="cpu",
        windows={"qkv": Window("qkv", 3 * 128), "down.half": Window("down.half", 64)},
        tensors=specs,
        shards=(
            *(shard(name, "qkv", 128 * at, 4, "float32") for at, name in enumerate("qkv")),
            shard("down", "down.half", 0, 4, "float32", cols=4),
        ),
    )
    return trainer, engine


def test_fused_parameters_are_read_in_place_and_column_blocks_through_landing_memory() -> None:
    trainer, engine = fused_world("float32")
    cost = ReadCost(arenas="never")
    staged = build_plan(engine, [trainer], cost=cost)
    plan = aim(staged, cost)
    assert [(read.window, read.target_offset_bytes) for read in plan.direct[0]] == [
        ("k", 128),
        ("q", 0),
        ("v", 256),
    ]
    assert [copy.tensor for copy in plan.copies] == ["down"]
    assert plan.landing_nbytes < staged.landing_nbytes == 3 * 128 + plan.landing_nbytes


def test_what_is_converted_on_the_way_is_never_aimed() -> None:
    trainer, engine = fused_world("bfloat16")
    assert not aim_directly(build_plan(engine, [trainer]), may_write=lambda _: True).direct


def test_what_an_arena_packs_and_narrows_is_read_into_the_parameter() -> None:
    trainer, engine = fused_world("float32")
    plan = aim_directly(build_plan(engine, [trainer]), may_write=lambda _: True)
    assert (plan.copies, plan.landing_nbytes) == ((), 0)
    assert (ARENA_WINDOW, "down.half") in {(read.window, read.target_window) for read in plan.direct[0]}


def test_over_links_that_take_rows_column_blocks_need_neither_arena_nor_landing_memory() -> None:
    trainer, engine = fused_world("float32")
    cost = ReadCost(by_trainer={0: ROWS})
    plan = aim(build_plan(engine, [trainer], cost=cost), cost)
    assert (plan.copies, plan.landing_nbytes, plan.arenas) == ((), 0, {})
    (columns,) = [read for read in plan.direct[0] if read.window == "down"]
    assert (columns.source, columns.target) == (Rows(0, 16, 4, 32), Rows(0, 16, 4, 16))


def test_a_whole_shard_lands_in_columns_of_a_wider_parameter() -> None:
    shape = (64, 32)
    trainers = [
        holding(box((0, 64), (16 * rank, 16 * rank + 16)), shape=shape, rank=rank) for rank in range(2)
    ]
    engine = holding(box((0, 64), (0, 32)), shape=shape, side="engine")
    for rank in range(2):
        cost = ReadCost(by_trainer={rank: ROWS})
        plan = aim(build_plan(engine, trainers, cost=cost), cost)
        (read,) = plan.direct[rank]
        assert (read.num_rows, read.target.pitch, read.source.pitch) == (64, 64, 32)
        assert {copy.trainer_rank for copy in plan.copies} == {1 - rank}
