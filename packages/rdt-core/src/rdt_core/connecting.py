"""How an engine rank's connection comes to be: a recording, a plan, landing memory, and links.

What the model's thread does while generation stands; see :mod:`rdt_core.connection` for what it is then.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

import torch

from rdt_core.connection import Connection
from rdt_core.describe import node_name
from rdt_core.free_memory import measure_free_bytes, measure_host_share
from rdt_core.landing import engine_manifest, make_landing
from rdt_core.link_plans import plan_links
from rdt_core.links import open_links
from rdt_core.meeting import (
    aim_in_place,
    is_near,
    meet_trainers,
    price_reads,
    reader_of,
    refuse_other_dtypes,
)
from rdt_core.mode import INPLACE, PINNED, choose_mode
from rdt_core.planner import build_plan
from rdt_core.probe import ScratchPool
from rdt_core.read_method import NEVER
from rdt_core.reader_thread import ReaderThread

if TYPE_CHECKING:
    from rdt_core.client import CoordinatorClient
    from rdt_core.connect_request import ConnectRequest
    from rdt_core.engine_model import EngineModel

LENDER_TIMEOUT_S = 15.0
"""How long a reader waits for every rank of an engine that was asked to lend."""


def open_connection(request: ConnectRequest, client: CoordinatorClient, model: EngineModel) -> Connection:
    """Record the loader, plan the reads, allocate what they need and open a link to each trainer rank.

    Called in the thread that runs the model, while it does not run. Leaves every parameter as it was.

    Raises:
        RdtError: see :meth:`rdt_core.subscriber.WeightSubscriber.connect`.
    """
    source = client.of_lender(request.lender) if request.lender else client
    patience_s = LENDER_TIMEOUT_S if request.lender else request.timeout_s
    found = meet_trainers(source, min(request.timeout_s, patience_s))
    recording = model.record(list(found.specs.values()))
    wanted = engine_manifest(
        recording,
        found.specs,
        rank=model.rank,
        world_size=model.world_size,
        node=node_name(),
        device=str(model.device),
    )
    # An engine that lends does so for one read, which is not worth an arena.
    arenas = NEVER if request.lender else request.arenas
    cost = price_reads(request, arenas, model.rank, model.device, found.manifests)
    staged = build_plan(wanted, found.manifests, cost=cost)
    if request.lender:
        refuse_other_dtypes(staged, found.specs)
    mode = choose_mode(
        request.mode,
        landing_nbytes=staged.landing_nbytes,
        free_nbytes=measure_free_bytes(model.device),
        host_nbytes=measure_host_share(model.device, model.world_size),
    )
    device = torch.device("cpu") if mode == PINNED else model.device
    if device != model.device:
        # Reads that land elsewhere may go another way, at another price.
        wanted = dataclasses.replace(wanted, device=str(device))
        cost = price_reads(request, arenas, model.rank, device, found.manifests)
        staged = build_plan(wanted, found.manifests, cost=cost)
    plan = aim_in_place(staged, recording, cost) if mode == INPLACE else staged
    landing = make_landing(plan, recording, found.specs, device)
    planned = plan_links(plan, landing, rests=request.rests_in(mode))
    with contextlib.ExitStack() as undo:
        scratch = ScratchPool()
        undo.callback(scratch.close)
        reader = reader_of(request, model.rank, device)
        links = open_links(reader, source, found.manifests, planned.by_rank, scratch)
        undo.pop_all()
    return Connection(
        request=request,
        client=client,
        source=source,
        engine_rank=model.rank,
        device=device,
        wanted=wanted,
        topology=found.topology,
        recording=recording,
        specs=found.specs,
        plan=plan,
        mode=mode,
        landing=landing,
        planned=planned,
        links=links,
        reader=ReaderThread(f"rdt-reader-{model.rank}"),
        is_near=is_near(found.manifests),
        scratch=scratch,
    )
