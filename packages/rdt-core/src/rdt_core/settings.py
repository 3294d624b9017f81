"""The environment variables that this project reads, all of them here.

    RDT_TRANSPORT                      the transport of every link whose driver does not name one
    RDT_API_KEY                        of the engines, for the command line
    RDT_GATEWAY_API_KEY                what a gateway asks of its callers
    RDT_ENGINE_API_KEY                 of the engines, for a gateway
    RDT_TRAINER_API_KEY                of the trainers' routes, for a gateway
    DATASYSTEM_HOST, DATASYSTEM_PORT   openYuanrong's own: the address of this node's data worker

Ray's own (``RAY_ADDRESS``, ``RAY_AUTH_*``) are read where Ray is joined, in ``rdt_core.ray_session``.
"""

from __future__ import annotations

import os

from rdt_core.choice import AUTO
from rdt_core.errors import ConfigError

API_KEY = "RDT_API_KEY"
GATEWAY_API_KEY = "RDT_GATEWAY_API_KEY"
ENGINE_API_KEY = "RDT_ENGINE_API_KEY"
TRAINER_API_KEY = "RDT_TRAINER_API_KEY"
_MAX_PORT = 65_535


def read_transport() -> str:
    """The transport forced by ``RDT_TRANSPORT``, or ``AUTO``. An argument in code goes before it."""
    return os.environ.get("RDT_TRANSPORT", "").strip() or AUTO


def read_key(variable: str) -> str:
    """A secret from one of the ``*_API_KEY`` variables; empty where there is none. Never log it."""
    return os.environ.get(variable, "")


def read_data_worker() -> tuple[str, int] | None:
    """Host and port of this node's openYuanrong data worker; None when they are not set.

    Raises:
        ConfigError: the port is no port.
    """
    host, port = os.environ.get("DATASYSTEM_HOST", "").strip(), os.environ.get("DATASYSTEM_PORT", "").strip()
    if not host or not port:
        return None
    if not port.isdecimal() or not 0 < int(port) <= _MAX_PORT:
        raise ConfigError(f"DATASYSTEM_PORT is {port!r}, expected a number from 1 to {_MAX_PORT}.")
    return host, int(port)
