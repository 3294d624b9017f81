"""What a read costs over each transport: the prices that a plan is made with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rdt_core.read_method import LinkPrice, ReadCost

if TYPE_CHECKING:
    from collections.abc import Mapping

# CUDA IPC: a range of a launch costs 2 ns on an H100 on top of its bytes (benchmarks/copies.py); bytes at
# what NVLink gives between two GPUs, the slower case. The others have the general price.
_PRICES = {
    "cuda_ipc": LinkPrice(bytes_per_s=4e11, per_read_s=2e-9, takes_rows=True),
    "memory": replace(ReadCost().of(0), takes_rows=True),
}


def cost_over(transports: Mapping[int, str], arenas: str) -> ReadCost:
    """Prices for a plan, each trainer rank at that of the link that leads to it.

    Args:
        transports: the chosen transport's name by trainer rank.
        arenas: see :class:`rdt_core.read_method.ReadCost`.
    """
    known = {rank: _PRICES[name] for rank, name in transports.items() if name in _PRICES}
    return replace(ReadCost(arenas=arenas), by_trainer=known)
