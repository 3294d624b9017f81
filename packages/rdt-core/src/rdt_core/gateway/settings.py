"""How a gateway is run."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from rdt_core import choice
from rdt_core.errors import ConfigError
from rdt_core.fan_out import AUTO as AUTO_FAN_OUT
from rdt_core.fan_out import check_policy
from rdt_core.pacing import WITHOUT_REST, check_read_share

DEFAULT_KEYS = frozenset({"areal-admin-key", "admin", "changeme", "secret", "password"})
"""Keys that everybody knows: the default of AReaL's gateway, and what stands in examples."""

COMMIT_POLICIES = ("group", "engine")

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Checked when made, so that a gateway that anyone could drive does not start.

    Args:
        host: address to listen on.
        port: to listen on.
        api_key: what clients send as a bearer token. May be empty on a loopback address only.
        group: the sync group of a ``/connect`` that names neither a group nor trainer workers.
        transport: for every link; by default each link chooses.
        commit_policy: ``"group"``, all engines of a pair or none; ``"engine"``, each for itself.
        fan_out: whether engines of one node read together, see :mod:`rdt_core.fan_out`.
        read_share: of the time in which an engine rank moves bytes while it reads, see
            :mod:`rdt_core.pacing`.
        engine_api_key: of the engine servers.
        trainer_api_key: of the trainers' own HTTP routes.
        init_timeout_s: for a connect, in seconds.
        update_timeout_s: for each phase of an update that names no ``timeout_s``.
        max_body_bytes: of a request.
        max_store_bytes: of all pair metadata together.

    Raises:
        ConfigError: the key is empty or a known default and the address is not a loopback one; a bound is
            not positive.
    """

    host: str = "127.0.0.1"
    port: int = 7080
    api_key: str = field(default="", repr=False)
    group: str = ""
    transport: str = choice.AUTO
    commit_policy: str = "group"
    fan_out: str = AUTO_FAN_OUT
    read_share: float = WITHOUT_REST
    engine_api_key: str = field(default="", repr=False)
    trainer_api_key: str = field(default="", repr=False)
    init_timeout_s: float = 300.0
    update_timeout_s: float = 120.0
    max_body_bytes: int = 4 * MIB
    max_store_bytes: int = 256 * MIB

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and (not self.api_key or self.api_key in DEFAULT_KEYS):
            what = "no API key" if not self.api_key else "an API key that everybody knows"
            raise ConfigError(
                f"the gateway would listen on {self.host} with {what}. Anyone who can reach it could replace "
                "the weights of every engine. Set RDT_GATEWAY_API_KEY to a secret, which `python -c "
                "'import secrets; print(secrets.token_urlsafe(32))'` makes, or listen on 127.0.0.1."
            )
        if self.commit_policy not in COMMIT_POLICIES:
            raise ConfigError(
                f"commit_policy {self.commit_policy!r} is none of {', '.join(COMMIT_POLICIES)}. Leave it out "
                "for all engines of a pair or none."
            )
        check_policy(self.fan_out)
        check_read_share(self.read_share)
        for name in ("init_timeout_s", "update_timeout_s", "max_body_bytes", "max_store_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be more than 0, got {getattr(self, name)!r}.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address; of names, ``localhost`` alone counts as such."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
