"""What this process can use, found out without loading any of it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from rdt_core import settings
from rdt_core.transports import find_conflict, known_transports

if TYPE_CHECKING:
    from collections.abc import Callable


def offered_transports(device: str) -> tuple[str, ...]:
    """Names of the transports that this process can use for memory of a device, sorted.

    Called once by every rank of either side, for its manifest or its connect. A transport that is offered
    may still fail to start; the connect then names it.

    Args:
        device: ``"cpu"``, ``"cuda:0"``, ...
    """
    kind = device.partition(":")[0]
    return tuple(
        name
        for name in known_transports()
        if find_conflict(name) is None and _CHECKS.get(name, _offer_always)(kind)
    )


def _is_installed(*modules: str) -> bool:
    try:
        return all(importlib.util.find_spec(module) is not None for module in modules)
    except ModuleNotFoundError:
        # find_spec imports the parents of a dotted name.
        return False


def _offer_always(kind: str) -> bool:
    del kind
    return True


def _offers_nixl(kind: str) -> bool:
    return kind in {"cpu", "cuda"} and _is_installed("ray", "nixl")


def _offers_cuda_ipc(kind: str) -> bool:
    return kind == "cuda"


def _offers_yr(kind: str) -> bool:
    return (
        kind in {"cpu", "npu"} and settings.read_data_worker() is not None and _is_installed("yr.datasystem")
    )


_CHECKS: dict[str, Callable[[str], bool]] = {
    "cuda_ipc": _offers_cuda_ipc,
    "nixl": _offers_nixl,
    "yr": _offers_yr,
}
"""By transport, given the kind of device. A transport that is not here is always offered."""
