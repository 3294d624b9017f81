"""All that one engine rank keeps from connect to disconnect: its plan, its memory and its links."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rdt_core import choice
from rdt_core.coordinator import reader_name
from rdt_core.describe import node_name
from rdt_core.digest import digest_bytes
from rdt_core.direct import aim_directly
from rdt_core.errors import (
    CannotLendError,
    CoordinatorLostError,
    DeadlineError,
    ForgottenError,
    RdtError,
    ShapeError,
    TopologyChangedError,
    TornReadError,
    TransportUnavailableError,
)
from rdt_core.free_memory import measure_free_bytes, measure_host_share
from rdt_core.landing import Landing, engine_manifest, make_landing
from rdt_core.link_prices import cost_over
from rdt_core.links import LinkPlan, OpenLinks, Reader, choose_links, open_links
from rdt_core.mode import AUTO, INPLACE, PINNED, choose_mode
from rdt_core.pacing import WITHOUT_REST, Pace, piece_nbytes
from rdt_core.plan import RELOAD_PREFIX
from rdt_core.planner import ReadCost, build_plan
from rdt_core.read_method import NEVER
from rdt_core.reader_thread import ReaderThread
from rdt_core.wire import manifest_from_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rdt_core.client import CoordinatorClient
    from rdt_core.engine_model import EngineModel
    from rdt_core.manifest import Manifest, TensorSpec
    from rdt_core.plan import Plan
    from rdt_core.recording import Recording


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
    read_share: float = WITHOUT_REST
    timeout_s: float = 60.0
    lender: str = ""
    lent_version: int = 0


logger = logging.getLogger(__name__)

TRAINERS = "trainers"
"""What a report names as the source of bytes that no engine lent."""

LENDER_TIMEOUT_S = 15.0
"""How long a reader waits for every rank of an engine that was asked to lend."""


@dataclass(slots=True, kw_only=True)
class Connection:
    """One engine rank's connection. Owned by its subscriber; ``lock`` is held by whoever reads or flips.

    ``client`` reaches the group, ``source`` the coordinator of those who are read: the same, unless another
    engine lends. ``device`` is that of the landing memory.
    """

    request: ConnectRequest
    client: CoordinatorClient
    source: CoordinatorClient
    engine_rank: int
    device: torch.device
    wanted: Manifest
    topology: str
    recording: Recording
    specs: dict[str, TensorSpec]
    plan: Plan
    mode: str
    landing: Landing
    links: OpenLinks
    reader: ReaderThread
    lock: threading.Lock = field(default_factory=threading.Lock)
    read_s: float = 0.0
    read_started_unix_s: float = 0.0
    link_times: dict[int, tuple[float, float]] = field(default_factory=dict)
    link_sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    is_closed: bool = False
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def is_in_place(self) -> bool:
        """Whether versions are read into the parameters themselves, at commit."""
        return self.mode == INPLACE

    def read(
        self, version: int, timeout_s: float, before_pull: Callable[[], None], verify: str | None
    ) -> None:
        """Bring every byte to its target under a lease, and assemble the reload buffers. Holding ``lock``.

        Args:
            version: that the trainers must hold from before the first byte until after the last.
            timeout_s: for all links together, in seconds; the lease lasts as long.
            before_pull: called before every link's pull; may raise, for a read that is not wanted any more.
            verify: ``"digest"`` to compare what was read with what the trainers hold, by digests.

        Raises:
            VersionError: the trainers do not hold this version throughout, or the read was aborted.
            TransportError: bytes did not arrive.
        """
        lease = self._begin_read(version, timeout_s)
        try:
            self._pull(version, timeout_s, before_pull)
            if verify is not None:
                self._compare_digests(version, timeout_s)
        except BaseException:
            # Ctrl-C too must not have the trainer wait for a lease until its deadline.
            with contextlib.suppress(RdtError):
                self.source.drop_lease(lease)
            raise
        self.source.end_read(lease, version)

    def _begin_read(self, version: int, timeout_s: float) -> int:
        engine, rank = self.request.engine, self.engine_rank
        self._check_source(version)
        try:
            return self.source.begin_read(engine, rank, version, self.topology, timeout_s)
        except ForgottenError:
            self.source.join(engine, rank, self.info)
            return self.source.begin_read(engine, rank, version, self.topology, timeout_s)

    @property
    def is_borrowing(self) -> bool:
        """Whether the links lead to another engine and not to the trainers."""
        return self.source is not self.client

    def _check_source(self, version: int) -> None:
        """The trainers have every version; an engine that lends has one."""
        if self.is_borrowing and version != self.request.lent_version:
            detail = f"engine {self.request.lender} lent version {self.request.lent_version} only"
            raise TopologyChangedError(self.request.group, detail)

    def check(self, version: int) -> None:
        """Whether there is something to read, from the trainer processes that the links lead to.

        Raises:
            VersionError: there is not.
        """
        self._check_source(version)
        self.source.check_version(version, self.topology)

    def relink(self) -> None:
        """Plan again, and open links again, for trainer processes that took the place of others.

        Called by the reader's thread, holding ``lock``: the recording stands, so the model is not needed.

        Raises:
            TopologyChangedError: the tensors are others too, so that the engine must connect again.
            RdtError: as :func:`open_connection` raises them; the old links are closed then.
        """
        self.stop_borrowing()
        found = _meet(self.client, self.request.timeout_s)
        if found.specs != self.specs:
            raise TopologyChangedError(self.request.group, "their tensors have other names, shapes or dtypes")
        self.links.close()
        cost = _price(self.request, self.request.arenas, self.engine_rank, self.device, found.manifests)
        staged = build_plan(self.wanted, found.manifests, cost=cost)
        self.plan = aim_in_place(staged, self.recording) if self.is_in_place else staged
        self.landing = make_landing(self.plan, self.recording, self.specs, self.device)
        self.links = open_links(
            _reader(self.request, self.engine_rank, self.device),
            self.client,
            found.manifests,
            _plan_links(self.request, self.mode, self.plan, self.landing),
        )
        self.topology = found.topology
        self.link_times.clear()
        self.link_sizes.clear()
        self.info |= self._describe_plan()
        self.client.join(self.request.engine, self.engine_rank, self.info)

    def stop_borrowing(self) -> None:
        """Let go of an engine that lends, if it is one that is read. Holding ``lock``; idempotent."""
        if self.is_borrowing:
            self.links.close()
            leave(self.source, self.request.engine, self.engine_rank)
            self.source = self.client

    def leave(self) -> None:
        """Leave the group, as far as it is still there."""
        for client in {id(client): client for client in (self.source, self.client)}.values():
            leave(client, self.request.engine, self.engine_rank)

    def _pull(self, version: int, timeout_s: float, before_pull: Callable[[], None]) -> None:
        started, self.read_started_unix_s = time.perf_counter(), time.time()
        deadline = time.monotonic() + timeout_s
        pace = Pace(_share_of(self.request, self.mode))
        for trainer_rank, links in self.links.by_rank.items():
            pull_started, pull_started_unix_s = time.perf_counter(), time.time()
            for link in links:
                pace.rest(deadline - time.monotonic())
                before_pull()
                with pace.moving():
                    link.pull(version, timeout_s=max(0.001, deadline - time.monotonic()))
            self.link_times[trainer_rank] = (pull_started_unix_s, time.perf_counter() - pull_started)
        self.landing.fill_reload_buffers()
        self.read_s = time.perf_counter() - started

    def _compare_digests(self, version: int, timeout_s: float) -> None:
        reader = {"reader": reader_name(self.request.engine, self.engine_rank)}
        held = self.source.ask("digest_reads", dict.fromkeys(self.links.by_rank, reader), timeout_s)
        planned = _plan_links(self.request, self.mode, self.plan, self.landing)
        for trainer_rank in self.links.by_rank:
            if held[trainer_rank] != [digest_bytes(target) for target in planned[trainer_rank].targets]:
                raise TornReadError(version, trainer_rank)

    def close(self) -> None:
        """Close the links, now or when the read that is under way ends. Idempotent; waits for no read."""
        self.is_closed = True
        self.reader.close()
        self.close_when_idle()

    def close_when_idle(self) -> None:
        """Close the links if the connection is closed and nobody reads. Called by whoever ends a read."""
        if self.is_closed and self.lock.acquire(blocking=False):
            try:
                self.links.close()
            finally:
                self.lock.release()

    def describe(self, model: EngineModel) -> dict[str, Any]:
        """Plain values for the driver and for people."""
        return {
            "rank": model.rank,
            "world_size": model.world_size,
            **self._describe_plan(),
        }

    def _describe_plan(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "read_share": _share_of(self.request, self.mode),
            "source": self.request.lender if self.is_borrowing else TRAINERS,
            "num_tensors": self.plan.num_tensors,
            "nbytes": self.plan.payload_nbytes,
            "read_nbytes": self.plan.read_nbytes,
            "num_reads": self.plan.num_reads,
            "landing_nbytes": self.landing.nbytes,
            "arena_bytes": self.plan.arena_bytes,
            "reload": dict(self.recording.reload),
            **self.links.describe(),
        }

    def describe_links(self) -> list[dict[str, Any]]:
        """What was read from each trainer rank and when: see :class:`rdt_core.report.LinkReport`."""
        return [
            {
                "trainer_rank": rank,
                "transport": self.links.choices[rank].transport,
                "nbytes": self._size_of(rank)[0],
                "num_reads": self._size_of(rank)[1],
                "started_unix_s": started_unix_s,
                "seconds": seconds,
            }
            for rank, (started_unix_s, seconds) in self.link_times.items()
        ]

    def _size_of(self, rank: int) -> tuple[int, int]:
        """Bytes and reads of one link, counted once: a plan may have tens of thousands."""
        if rank not in self.link_sizes:
            reads = self.plan.reads_from(rank)
            self.link_sizes[rank] = (sum(read.nbytes for read in reads), len(reads))
        return self.link_sizes[rank]


def open_connection(request: ConnectRequest, client: CoordinatorClient, model: EngineModel) -> Connection:
    """Record the loader, plan the reads, allocate what they need and open a link to each trainer rank.

    Called in the thread that runs the model, while it does not run. Leaves every parameter as it was.

    Raises:
        RdtError: see :meth:`rdt_core.subscriber.WeightSubscriber.connect`.
    """
    source = client.of_lender(request.lender) if request.lender else client
    found = _meet(source, min(request.timeout_s, LENDER_TIMEOUT_S) if request.lender else request.timeout_s)
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
    cost = _price(request, arenas, model.rank, model.device, found.manifests)
    staged = build_plan(wanted, found.manifests, cost=cost)
    if request.lender:
        _refuse_other_dtypes(staged, found.specs)
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
        cost = _price(request, arenas, model.rank, device, found.manifests)
        staged = build_plan(wanted, found.manifests, cost=cost)
    plan = aim_in_place(staged, recording) if mode == INPLACE else staged
    landing = make_landing(plan, recording, found.specs, device)
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
        links=open_links(
            _reader(request, model.rank, device),
            source,
            found.manifests,
            _plan_links(request, mode, plan, landing),
        ),
        reader=ReaderThread(f"rdt-reader-{model.rank}"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trainers:
    """The trainer ranks as they are now."""

    topology: str
    manifests: list[Manifest]
    specs: dict[str, TensorSpec]


def _meet(client: CoordinatorClient, timeout_s: float) -> _Trainers:
    # Asked for first: should a rank be replaced meanwhile, the first read finds out.
    client.manifests(timeout_s)
    topology = client.topology()
    manifests = [manifest_from_bytes(raw) for raw in client.manifests(timeout_s)]
    return _Trainers(topology=topology, manifests=manifests, specs=merge_specs(manifests))


def aim_in_place(plan: Plan, recording: Recording) -> Plan:
    """The plan for in-place mode.

    An engine's own loader, which takes the reload tensors, must run before any other byte is in place (see
    :class:`Recording`). So where there are such tensors only they are read directly, and the rest lands
    beside the parameters.
    """

    def may_write(window: str) -> bool:
        return not recording.reload or window.startswith(RELOAD_PREFIX)

    return aim_directly(plan, may_write=may_write)


def _price(
    request: ConnectRequest, arenas: str, engine_rank: int, device: torch.device, trainers: Sequence[Manifest]
) -> ReadCost:
    """What reads cost over the links that would be chosen; general prices where not all can be."""
    try:
        choices = choose_links(_reader(request, engine_rank, device), trainers)
    except TransportUnavailableError:
        return ReadCost(arenas=arenas)  # a link that is needed fails when it is opened
    return cost_over({rank: choice.transport for rank, choice in choices.items()}, arenas)


def _reader(request: ConnectRequest, engine_rank: int, device: torch.device) -> Reader:
    return Reader(
        engine=request.engine,
        rank=engine_rank,
        device=device,
        forced=request.transport,
        timeout_s=request.timeout_s,
    )


def _plan_links(request: ConnectRequest, mode: str, plan: Plan, landing: Landing) -> dict[int, LinkPlan]:
    """What to read from each trainer rank: over one link, or piece by piece where reads rest."""
    whole = {
        rank: LinkPlan(
            ranges=[(read.window, read.offset_bytes, read.nbytes) for read in plan.reads_from(rank)],
            targets=landing.targets(plan.reads_from(rank)),
            items=plan.arenas.get(rank, ()),
        )
        for rank in plan.trainer_ranks
    }
    if _share_of(request, mode) == WITHOUT_REST:
        return whole
    return {rank: planned.cut(piece_nbytes(plan.read_nbytes)) for rank, planned in whole.items()}


def _share_of(request: ConnectRequest, mode: str) -> float:
    """Nothing rests in place: there the model waits for the read."""
    return WITHOUT_REST if mode == INPLACE else request.read_share


def _refuse_other_dtypes(plan: Plan, specs: dict[str, TensorSpec]) -> None:
    """An engine that lends must hold what the trainers hold, or what this one holds, bit for bit.

    Raises:
        CannotLendError: it rounded a tensor that this engine would not have rounded so.
    """
    for copy in plan.copies:
        if copy.source_dtype not in (copy.target_dtype, specs[copy.tensor].dtype):
            reason = f"it holds {copy.tensor} as {copy.source_dtype}, the reader as {copy.target_dtype}"
            raise CannotLendError(copy.trainer_rank, reason)


def leave(client: CoordinatorClient, engine: str, rank: int) -> None:
    """Leave a group, if it is still there."""
    try:
        client.leave(engine, rank)
    except (CoordinatorLostError, DeadlineError) as error:
        logger.debug("left a group whose coordinator is gone: %s", error)


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
