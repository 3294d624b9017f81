"""Ways to move bytes one-sidedly, each behind the same small protocol."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from rdt_core.errors import TransportUnavailableError

if TYPE_CHECKING:
    from rdt_core.transports.base import Transport

_FACTORIES = {
    "cuda_ipc": "rdt_core.transports.cuda_ipc:CudaIpcTransport",
    "memory": "rdt_core.transports.memory:MemoryTransport",
    "nixl": "rdt_core.transports.nixl:NixlTransport",
}

TRANSPORTS = tuple(_FACTORIES)
"""Names that :func:`make_transport` takes."""


def known_transports() -> list[str]:
    """Names of all transports, whether or not this process can use them; sorted."""
    return sorted(_FACTORIES)


def make_transport(name: str) -> Transport:
    """The transport of that name, ready for this process.

    Raises:
        TransportUnavailableError: no such transport, or what it needs is not installed.
    """
    if name not in _FACTORIES:
        raise TransportUnavailableError(
            name, "there is no such transport", f"Known are {known_transports()}."
        )
    module, _, cls = _FACTORIES[name].partition(":")
    return cast("Transport", getattr(importlib.import_module(module), cls)())
