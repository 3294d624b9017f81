"""What a driver tells an engine so that its ranks can join a group."""

from __future__ import annotations

from dataclasses import dataclass

from rdt_core import choice, fan_out
from rdt_core.mode import AUTO, INPLACE
from rdt_core.pacing import WITHOUT_REST


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectRequest:
    """What a driver tells an engine so that its ranks can join a group.

    Args:
        group: name of the sync group.
        engine: the engine's identity among the group's engines; its URL by default.
        ray_address: ``host:port`` of the cluster's GCS, or ``"auto"``.
        ray_auth_mode: the driver's ``RAY_AUTH_MODE``; never a token.
        transport: name of the transport to force, or ``"auto"``.
        mode: ``"staged"``, ``"pinned"``, ``"inplace"``, or ``"auto"``, see :func:`rdt_core.mode.choose_mode`.
        arenas: ``"auto"`` or ``"never"``, see :class:`rdt_core.read_method.ReadCost`.
        fan_out: ``"auto"``, ``"always"`` or ``"never"``, see :mod:`rdt_core.fan_out`.
        read_share: of the time in which bytes move while a version is read beside generation, see
            :mod:`rdt_core.pacing`.
        timeout_s: for each wait of the connect, in seconds.
        lender: an engine that lends ``lent_version``, to read that one from; empty to read from the trainers,
            as every other version is.
        lent_version: see ``lender``.
    """

    group: str
    engine: str
    ray_address: str = ""
    ray_auth_mode: str = ""
    transport: str = choice.AUTO
    mode: str = AUTO
    arenas: str = "auto"
    fan_out: str = fan_out.AUTO
    read_share: float = WITHOUT_REST
    timeout_s: float = 60.0
    lender: str = ""
    lent_version: int = 0

    def rests_in(self, mode: str) -> bool:
        """Whether reads rest between pieces."""
        return self.share_in(mode) != WITHOUT_REST

    def share_in(self, mode: str) -> float:
        """Share of the time in which bytes move. In place all of it: there the model waits for the read."""
        return WITHOUT_REST if mode == INPLACE else self.read_share
