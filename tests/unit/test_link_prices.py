from __future__ import annotations

from rdt_core.link_prices import cost_over
from rdt_core.planner import build_plan
from rdt_core.read_method import ReadCost
from tests.unit.worlds_by_hand import box, holding


def test_a_read_over_cuda_ipc_costs_next_to_nothing() -> None:
    cost = cost_over({0: "cuda_ipc", 1: "cuda_ipc"}, "never")
    assert cost.arenas == "never"
    assert cost.of(1).per_read_s < ReadCost().per_read_s / 100


def test_each_trainer_rank_has_the_price_of_the_link_that_leads_to_it() -> None:
    cost = cost_over({0: "cuda_ipc", 1: "nixl"}, "auto")
    assert cost.of(0) == cost_over({0: "cuda_ipc"}, "auto").of(0)
    assert cost.of(1) == cost.of(7) == ReadCost().of(1)


def test_column_blocks_of_one_plan_are_packed_where_reads_are_dear_and_read_as_they_lie_where_not() -> None:
    """Two ranks hold equal halves, one over CUDA IPC: only the other's columns are worth an arena."""
    shape = (512, 4096)
    trainers = [
        holding(box((0, 256), (0, 4096)), shape=shape, rank=0),
        holding(box((256, 512), (0, 4096)), shape=shape, rank=1),
    ]
    engine = holding(box((0, 512), (0, 2048)), shape=shape, side="engine")
    plan = build_plan(engine, trainers, cost=cost_over({0: "cuda_ipc", 1: "nixl"}, "auto"))
    assert {copy.trainer_rank: copy.method for copy in plan.copies} == {0: "rows", 1: "packed"}
