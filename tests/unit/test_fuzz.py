"""A seeded part of ``nox -s fuzz``, and by name what it has found."""

from __future__ import annotations

import asyncio

import msgpack
import pytest

from rdt_core.coordinator import Coordinator
from rdt_core.errors import WireFormatError
from rdt_core.line import pack, unpack
from rdt_core.planner import ReadCost, build_plan
from rdt_core.read_method import MAX_BLOCKS
from rdt_core.timeouts import MAX_TIMEOUT_S, check_timeout
from tests.fuzz.run import Result, fuzz
from tests.fuzz.targets import Target, make_pure_targets
from tests.unit.worlds_by_hand import NAME, around, box, dense_shard

TARGETS = make_pure_targets()


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_malformed_input_is_refused_by_an_error_of_ours(target: Target) -> None:
    result = fuzz(target, 60, first_seed=7)
    assert result.num_inputs >= 60
    assert result.refused


def test_a_fuzzed_target_that_was_slow_or_took_memory_is_told() -> None:
    assert Result("x").is_bounded
    assert not Result("x", slowest_s=60.0).is_bounded
    assert not Result("x", peak_mb=4096.0).is_bounded


def test_values_nested_deeper_than_any_call_needs_do_not_crash_who_unpacks_them() -> None:
    value = pack(())
    for _ in range(5_000):
        value = msgpack.packb(msgpack.ExtType(1, b"\x91" + value))
    with pytest.raises(ValueError, match="nested"):
        unpack(value)
    assert unpack(pack(((((1,),),),))) == ((((1,),),),)


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), 1e300, 2 * MAX_TIMEOUT_S, "1", None, True])
def test_a_wait_that_would_never_end_is_refused(timeout_s: object) -> None:
    with pytest.raises(WireFormatError):
        check_timeout(timeout_s)
    with pytest.raises(WireFormatError):
        asyncio.run(Coordinator("policy").wait_published(1, timeout_s))  # type: ignore[arg-type]  # from the network


def test_a_wait_of_less_than_nothing_does_not_wait() -> None:
    assert check_timeout(-1) == 0.0


def test_a_manifest_that_claims_more_runs_than_a_plan_can_list_is_read_as_one_range() -> None:
    shape = (2**40, 4)
    column = box((0, 2**40), (0, 2))
    wide = dense_shard(box((0, 2**40), (0, 4)), dtype="float32")
    trainer = around(wide, shapes={NAME: shape}, world_size=1)
    engine = around(dense_shard(column, dtype="float32"), shapes={NAME: shape}, side="engine", world_size=1)
    plan = build_plan(engine, [trainer], cost=ReadCost(arenas="never", max_over_read=1.0))
    assert plan.num_reads == 1
    assert plan.num_reads <= MAX_BLOCKS
