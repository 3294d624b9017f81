"""Ways to move bytes one-sidedly, each behind the same small protocol."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, cast

from rdt_core.errors import TransportUnavailableError

if TYPE_CHECKING:
    from rdt_core.transports.base import Transport

_FACTORIES = {
    "cuda_ipc": "rdt_core.transports.cuda_ipc:CudaIpcTransport",
    "memory": "rdt_core.transports.memory:MemoryTransport",
    "nixl": "rdt_core.transports.nixl:NixlTransport",
    "yr": "rdt_core.transports.yr:YrTransport",
}

TRANSPORTS = tuple(_FACTORIES)
"""Names that :func:`make_transport` takes."""


_CONFLICTS = {"nixl": "yr.datasystem", "yr": "nixl._api"}
"""What must not be loaded already. NIXL 1.5.1 and openYuanrong 0.8.1 register the same protobuf files, and
the second of them to load ends the process with a segmentation fault."""


def known_transports() -> list[str]:
    """Names of all transports, whether or not this process can use them; sorted."""
    return sorted(_FACTORIES)


def find_conflict(name: str) -> str | None:
    """The module that this process has loaded and that keeps a transport out of it, or None."""
    other = _CONFLICTS.get(name)
    return other if other in sys.modules else None


def make_transport(name: str) -> Transport:
    """The transport of that name, ready for this process.

    Raises:
        TransportUnavailableError: no such transport, what it needs is not installed, or what this process has
            loaded already keeps it out.
    """
    if name not in _FACTORIES:
        raise TransportUnavailableError(
            name, "there is no such transport", f"Known are {known_transports()}."
        )
    other = find_conflict(name)
    if other is not None:
        raise TransportUnavailableError(
            name,
            f"this process has loaded {other}, beside which its native library crashes",
            "Use one of the two in all ranks of a process: RDT_TRANSPORT.",
        )
    module, _, cls = _FACTORIES[name].partition(":")
    return cast("Transport", getattr(importlib.import_module(module), cls)())
