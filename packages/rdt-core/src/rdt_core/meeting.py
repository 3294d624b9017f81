"""What a connect finds of a group's trainers, and what reads from them would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.describe import node_name
from rdt_core.direct import aim_directly
from rdt_core.errors import CannotLendError, ShapeError, TransportUnavailableError
from rdt_core.link_prices import cost_over
from rdt_core.links import Reader, choose_links
from rdt_core.plan import RELOAD_PREFIX
from rdt_core.planner import ReadCost
from rdt_core.wire import manifest_from_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from rdt_core.client import CoordinatorClient
    from rdt_core.connect_request import ConnectRequest
    from rdt_core.manifest import Manifest, TensorSpec
    from rdt_core.plan import Plan
    from rdt_core.recording import Recording


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainers:
    """The trainer ranks as they are now."""

    topology: str
    manifests: list[Manifest]
    specs: dict[str, TensorSpec]


def meet_trainers(client: CoordinatorClient, timeout_s: float) -> Trainers:
    """Every trainer rank's manifest, once all have attached; blocks, at most ``timeout_s`` seconds.

    Raises:
        MissingTrainerRankError: some have not.
        ShapeError: two disagree about a tensor.
    """
    # Asked for first: should a rank be replaced meanwhile, the first read finds out.
    client.manifests(timeout_s)
    topology = client.topology()
    manifests = [manifest_from_bytes(raw) for raw in client.manifests(timeout_s)]
    return Trainers(topology=topology, manifests=manifests, specs=merge_specs(manifests))


def merge_specs(manifests: Sequence[Manifest]) -> dict[str, TensorSpec]:
    """Every tensor of the group by name, in a fixed order.

    Raises:
        ShapeError: two trainer ranks disagree about a tensor's shape or dtype.
    """
    merged: dict[str, TensorSpec] = {}
    for manifest in manifests:
        for name, spec in manifest.tensors.items():
            known = merged.setdefault(name, spec)
            if known != spec:
                raise ShapeError(
                    name,
                    manifest.rank,
                    f"{spec.dtype}{list(spec.shape)}",
                    f"{known.dtype}{list(known.shape)}",
                )
    return dict(sorted(merged.items()))


def aim_in_place(plan: Plan, recording: Recording, cost: ReadCost) -> Plan:
    """The plan for in-place mode, from one that was made at the same prices.

    An engine's own loader, which takes the reload tensors, must run before any other byte is in place (see
    :class:`Recording`). So where there are such tensors only they are read directly, and the rest lands
    beside the parameters.
    """

    def may_write(window: str) -> bool:
        return not recording.reload or window.startswith(RELOAD_PREFIX)

    return aim_directly(plan, may_write=may_write, takes_rows=lambda rank: cost.of(rank).takes_rows)


def price_reads(
    request: ConnectRequest, arenas: str, engine_rank: int, device: torch.device, trainers: Sequence[Manifest]
) -> ReadCost:
    """What reads cost over the links that would be chosen; general prices where not all can be."""
    try:
        choices = choose_links(reader_of(request, engine_rank, device), trainers)
    except TransportUnavailableError:
        return ReadCost(arenas=arenas)  # a link that is needed fails when it is opened
    return cost_over({rank: choice.transport for rank, choice in choices.items()}, arenas)


def reader_of(request: ConnectRequest, engine_rank: int, device: torch.device) -> Reader:
    """The engine rank as its links know it."""
    return Reader(
        engine=request.engine,
        rank=engine_rank,
        device=device,
        forced=request.transport,
        timeout_s=request.timeout_s,
    )


def is_near(trainers: Sequence[Manifest]) -> bool:
    """Whether all trainer ranks are on this node."""
    return all(manifest.node == node_name() for manifest in trainers)


def refuse_other_dtypes(plan: Plan, specs: dict[str, TensorSpec]) -> None:
    """An engine that lends must hold what the trainers hold, or what this one holds, bit for bit.

    Raises:
        CannotLendError: it rounded a tensor that this engine would not have rounded so.
    """
    for copy in plan.copies:
        if copy.source_dtype not in (copy.target_dtype, specs[copy.tensor].dtype):
            reason = f"it holds {copy.tensor} as {copy.source_dtype}, the reader as {copy.target_dtype}"
            raise CannotLendError(copy.trainer_rank, reason)
