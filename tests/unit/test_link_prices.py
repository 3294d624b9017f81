from __future__ import annotations

from rdt_core.link_prices import cost_over
from rdt_core.read_method import ReadCost


def test_a_read_over_cuda_ipc_costs_next_to_nothing() -> None:
    cost = cost_over(["cuda_ipc", "cuda_ipc"], "auto")
    assert cost.arenas == "auto"
    assert cost.per_read_s < ReadCost().per_read_s / 100


def test_other_and_mixed_transports_have_the_general_prices() -> None:
    for transports in (["nixl"], ["cuda_ipc", "nixl"], []):
        assert cost_over(transports, "auto") == ReadCost(arenas="auto")
        assert cost_over(transports, "never") == ReadCost(arenas="never")
