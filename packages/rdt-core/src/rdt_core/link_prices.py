"""What a read costs over each transport: the prices that a plan is made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdt_core.read_method import ReadCost

if TYPE_CHECKING:
    from collections.abc import Collection

# (bytes a second, seconds a read). CUDA IPC: a row of a launch costs 2 ns on an H100 on top of its bytes
# (benchmarks/copies.py); bytes at what NVLink gives between two GPUs, the slower case.
_PRICES = {"cuda_ipc": (4e11, 2e-9)}


def cost_over(transports: Collection[str], arenas: str) -> ReadCost:
    """Prices for a plan whose links use these transports; the general ones unless all are of one kind.

    Args:
        transports: names, one or more.
        arenas: see :class:`rdt_core.read_method.ReadCost`.
    """
    kinds = set(transports)
    prices = _PRICES.get(next(iter(kinds))) if len(kinds) == 1 else None
    if prices is None:
        return ReadCost(arenas=arenas)
    return ReadCost(bytes_per_s=prices[0], per_read_s=prices[1], arenas=arenas)
