"""Which transport a link uses: a table over where the two sides are and what they can do."""

from __future__ import annotations

from dataclasses import dataclass

from rdt_core.errors import TransportUnavailableError

AUTO = "auto"
"""Asks for the table's choice."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the choice looks at of one side of a link.

    Args:
        who: for messages, ``"trainer rank 3"``.
        node: identifies the host.
        device: of the memory that is read or written, ``"cpu"``, ``"cuda:0"``, ...
        offers: names of the transports that this process can use.
    """

    who: str
    node: str
    device: str
    offers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.who} ({self.device} on {self.node}, offers {', '.join(self.offers) or 'nothing'})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the table.

    Args:
        transport: what to use.
        devices: kinds of memory that it connects, whichever is on which side.
        same_node: whether it cannot leave the host.
        why: shown to users beside the choice.
    """

    transport: str
    devices: frozenset[str]
    same_node: bool
    why: str

    def fits(self, trainer: Endpoint, engine: Endpoint) -> bool:
        """Whether this row is about such a pair."""
        kinds = {side.device.partition(":")[0] for side in (trainer, engine)}
        return kinds <= self.devices and not (self.same_node and trainer.node != engine.node)


RULES = (
    Rule(
        transport="cuda_ipc",
        devices=frozenset({"cuda"}),
        same_node=True,
        why="CUDA memory on both sides of one node",
    ),
    Rule(
        transport="yr",
        devices=frozenset({"npu"}),
        same_node=False,
        why="Ascend memory on both sides",
    ),
    Rule(
        transport="nixl",
        devices=frozenset({"cpu", "cuda"}),
        same_node=False,
        why="one-sided reads between any CPU and CUDA memory",
    ),
)
"""Best first. ``memory``, the fake, is in no row: it is used only when forced."""


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """What one link uses.

    Args:
        transport: its name.
        reason: in words, with what it was preferred to or why something better was passed over.
        is_second_best: whether a better row fitted but one side does not offer its transport.
    """

    transport: str
    reason: str
    is_second_best: bool = False


def choose_transport(trainer: Endpoint, engine: Endpoint, forced: str = AUTO) -> TransportChoice:
    """The transport of one link. Pure; called by the engine rank for each trainer rank at connect.

    Args:
        trainer: the side that is read.
        engine: the side that reads.
        forced: a transport's name, or :data:`AUTO` for the table's choice.

    Raises:
        TransportUnavailableError: a side does not offer the forced one, or no row fits what both offer.
    """
    if forced != AUTO:
        lacking = _lacking(forced, trainer, engine)
        if lacking:
            raise TransportUnavailableError(
                forced, f"not offered by {lacking}", "Install what it needs there, or do not force it."
            )
        return TransportChoice(forced, "forced")
    passed_over: list[str] = []
    for rule in RULES:
        if not rule.fits(trainer, engine):
            continue
        lacking = _lacking(rule.transport, trainer, engine)
        if not lacking:
            reason = "; ".join([rule.why, *passed_over])
            return TransportChoice(rule.transport, reason, is_second_best=bool(passed_over))
        passed_over.append(f"{rule.transport} is not offered by {lacking}")
    reason = "; ".join(passed_over) or f"no rule connects {trainer} with {engine}"
    raise TransportUnavailableError(
        AUTO, reason, "Install a transport on both sides, or force one: RDT_TRANSPORT."
    )


def _lacking(transport: str, trainer: Endpoint, engine: Endpoint) -> str:
    return " and ".join(str(side) for side in (trainer, engine) if transport not in side.offers)
