"""The engine's half of weight sync: reads versions from trainer ranks and flips one model to them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rdt_core import ray_session
from rdt_core.client import CoordinatorClient, RayChannel
from rdt_core.coordinator import Outcome
from rdt_core.describe import node_name, typed_view
from rdt_core.digest import RegionDigest, digest_region
from rdt_core.errors import (
    CoordinatorLostError,
    DeadlineError,
    NotConnectedError,
    NotPreparedError,
    RdtError,
    ShapeError,
    StaleVersionError,
)
from rdt_core.landing import Landing, engine_manifest, make_landing
from rdt_core.planner import build_plan
from rdt_core.transports import make_transport
from rdt_core.wire import manifest_from_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rdt_core.client import Channel
    from rdt_core.engine_model import EngineModel
    from rdt_core.manifest import Manifest, TensorSpec
    from rdt_core.plan import Plan
    from rdt_core.recording import Recording
    from rdt_core.transports.base import Link

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectRequest:
    """What a driver tells an engine so that its ranks can join a group.

    Args:
        group: name of the sync group.
        engine: the engine's identity among the group's engines; its URL by default.
        ray_address: ``host:port`` of the cluster's GCS, or ``"auto"``.
        ray_auth_mode: the driver's ``RAY_AUTH_MODE``; never a token.
        transport: name of the transport to use.
        timeout_s: for each wait of the connect, in seconds.
    """

    group: str
    engine: str
    ray_address: str = ""
    ray_auth_mode: str = ""
    transport: str = "nixl"
    timeout_s: float = 60.0


@dataclass(slots=True)
class _Connection:
    """All that exists from connect to disconnect."""

    request: ConnectRequest
    client: CoordinatorClient
    recording: Recording
    specs: dict[str, TensorSpec]
    plan: Plan
    landing: Landing
    links: dict[int, Link]
    lock: threading.Lock = field(default_factory=threading.Lock)
    wanted: int | None = None
    prepared: int | None = None
    read_s: float = 0.0
    read_started_unix_s: float = 0.0
    link_times: dict[int, tuple[float, float]] = field(default_factory=dict)
    reader: threading.Thread | None = None
    is_closed: bool = False

    def close_links_unless_reading(self) -> None:
        """Close the links of a closed connection; where a read is under way, the reader does it afterwards.

        Called by ``disconnect`` on the model's thread, which must not wait for a read, and after every read.
        """
        if self.is_closed and self.lock.acquire(blocking=False):
            try:
                for link in self.links.values():
                    link.close()
            finally:
                self.lock.release()


class WeightSubscriber:
    """One engine rank's part in a sync group. An engine adapter makes one in each worker process.

    :meth:`connect`, :meth:`commit` and :meth:`disconnect` are called from the thread that runs the model,
    while it does not run; :meth:`start_prepare` returns at once and reads in a thread of its own.

    Args:
        model: the adapter's view of this rank's model.
        channel: how to reach a group's coordinator; by default its named Ray actor.
    """

    def __init__(self, model: EngineModel, *, channel: Channel | None = None) -> None:
        self._model = model
        self._channel = channel
        self._connection: _Connection | None = None
        self._version = 0
        self._session = ""
        self._is_torn = False

    @property
    def version(self) -> int:
        """The group's version that the model holds; 0 before the first commit of this group's session."""
        return self._version

    def connect(self, request: ConnectRequest) -> dict[str, Any]:
        """Join a group: record the loader, plan the reads, open links to the trainer ranks.

        Blocks for seconds on first use. Replaces an earlier connection. The model is left as it was, whatever
        happens; after an error there is no connection.

        Returns:
            Plain values: rank, world_size, num_tensors, nbytes, read_nbytes, num_reads, landing_nbytes,
            reload, trainers, connect_s.

        Raises:
            RdtError: the typed reason; see the README's table.
        """
        started = time.perf_counter()
        self.disconnect()
        client = self._reach(request)
        manifests = [manifest_from_bytes(raw) for raw in client.manifests(request.timeout_s)]
        specs = merge_specs(manifests)
        recording = self._model.record(list(specs.values()))
        wanted = engine_manifest(
            recording,
            specs,
            rank=self._model.rank,
            world_size=self._model.world_size,
            node=node_name(),
            device=str(self._model.device),
        )
        plan = build_plan(wanted, manifests)
        landing = make_landing(plan, recording, specs, self._model.device)
        with contextlib.ExitStack() as opened:
            links = self._open_links(request, client, plan, landing, opened)
            info = {
                "rank": self._model.rank,
                "world_size": self._model.world_size,
                "num_tensors": plan.num_tensors,
                "nbytes": plan.payload_nbytes,
                "read_nbytes": plan.read_nbytes,
                "num_reads": plan.num_reads,
                "landing_nbytes": landing.nbytes,
                "reload": dict(recording.reload),
                "trainers": dict.fromkeys(links, request.transport),
                "connect_s": time.perf_counter() - started,
            }
            session = client.session()
            if session != self._session:
                self._session, self._version = session, 0
            client.join(request.engine, self._model.rank, info)
            opened.pop_all()
        self._connection = _Connection(request, client, recording, specs, plan, landing, links)
        logger.info(
            "rank %d connected to sync group %s: %d tensors, %d bytes, %d reads, %.2f s",
            self._model.rank,
            request.group,
            plan.num_tensors,
            plan.read_nbytes,
            plan.num_reads,
            info["connect_s"],
        )
        return info

    def prepare(self, version: int, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """Read ``version`` into landing memory. Blocks until it is there; touches no parameter.

        Raises:
            NotConnectedError: connect first.
            StaleVersionError: not greater than the committed version.
            NotPublishedError: some trainer rank does not hold it yet.
            SupersededError: a trainer rank published again before the read was done.
            SourceDiedError, PullTimeoutError, TransportError: bytes did not arrive.
        """
        connection = self._connected("prepare")
        if version <= self._version:
            raise StaleVersionError(version, self._version, "committed by this engine")
        try:
            with connection.lock:
                connection.wanted, connection.prepared = version, None
                _read(connection, version, timeout_s)
                # An abort during the read has taken the wish back.
                connection.prepared = connection.wanted
        finally:
            connection.close_links_unless_reading()
        return {"version": version, "prepare_s": connection.read_s}

    def start_prepare(self, version: int, attempt: str, *, timeout_s: float = 60.0) -> None:
        """Begin :meth:`prepare` in a thread and return; the coordinator is told how it ended.

        Args:
            version: to read.
            attempt: the driver's name for this try, under which it waits for the outcome.
            timeout_s: for the read.

        Raises:
            NotConnectedError: connect first.
            StaleVersionError: not greater than the committed version.
        """
        connection = self._connected("prepare")
        if version <= self._version:
            raise StaleVersionError(version, self._version, "committed by this engine")

        def read() -> None:
            try:
                outcome = Outcome(self.prepare(version, timeout_s=timeout_s))
            except RdtError as error:
                outcome = Outcome(error=error)
            self._report(connection, attempt, outcome)

        connection.reader = threading.Thread(target=read, name=f"rdt-reader-{self._model.rank}", daemon=True)
        connection.reader.start()

    def commit(self, version: int) -> dict[str, Any]:
        """Flip the model to a prepared version by local copies. Called while the model does not run.

        Returns:
            Plain values: version, rank, commit_s, prepare_s, nbytes, read_nbytes, num_reads, num_tensors,
            trainers, links, prepare_started_unix_s, commit_started_unix_s.

        Raises:
            NotConnectedError: connect first.
            NotPreparedError: this version has not been read.
        """
        connection = self._connected("commit")
        # A read that is under way holds the lock; the model's thread must not wait for it.
        if not connection.lock.acquire(blocking=False):
            raise NotPreparedError(version, None)
        try:
            if connection.prepared != version:
                raise NotPreparedError(version, connection.prepared)
            started, started_unix_s = time.perf_counter(), time.time()
            self._is_torn = True
            if connection.landing.reload_buffers:
                self._model.load(list(connection.landing.reload_buffers.items()))
            connection.landing.fill_parameters()
            self._model.finalize()
            self._is_torn = False
            self._version, connection.prepared = version, None
        finally:
            connection.lock.release()
        return {
            "version": version,
            "rank": self._model.rank,
            "commit_s": time.perf_counter() - started,
            "prepare_s": connection.read_s,
            "nbytes": connection.plan.payload_nbytes,
            "read_nbytes": connection.plan.read_nbytes,
            "num_reads": connection.plan.num_reads,
            "num_tensors": connection.plan.num_tensors,
            "trainers": dict.fromkeys(connection.links, connection.request.transport),
            "prepare_started_unix_s": connection.read_started_unix_s,
            "commit_started_unix_s": started_unix_s,
            "links": _describe_links(connection),
        }

    def abort(self) -> None:
        """Forget what was prepared; the model keeps serving what it has. Idempotent."""
        if self._connection is not None:
            # No waiting: this is the model's thread, and a read may be under way for as long as its deadline.
            self._connection.wanted = self._connection.prepared = None

    def digests(self) -> list[RegionDigest]:
        """Digest every recorded region where it lies in the live parameters; seconds for a billion."""
        connection = self._connected("digest")
        return [
            RegionDigest(
                tensor=shard.tensor,
                start=shard.region.start,
                stop=shard.region.stop,
                dtype=shard.dtype,
                digest=digest_region(
                    typed_view(
                        connection.recording.windows[shard.window],
                        shard.dtype,
                        shard.region.shape,
                        shard.offset_bytes,
                        shard.stride_bytes,
                    ),
                    shard.region,
                    connection.specs[shard.tensor].shape,
                ),
            )
            for shard in connection.recording.shards
        ]

    def unverified(self) -> list[str]:
        """Tensors that go through the engine's own loader; their bytes in the engine are not digested."""
        return sorted(self._connected("digest").recording.reload)

    def status(self) -> dict[str, Any]:
        """Plain values: rank, version, group (None when not connected), prepared, is_torn."""
        connection = self._connection
        return {
            "rank": self._model.rank,
            "world_size": self._model.world_size,
            "version": self._version,
            "group": connection.request.group if connection else None,
            "prepared": connection.prepared if connection else None,
            "is_torn": self._is_torn,
        }

    def disconnect(self) -> None:
        """Close all links and leave the group. Idempotent; the model keeps its version.

        Does not wait for a read that is under way: it ends by itself, and its links are closed then.
        """
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection.is_closed = True
        connection.close_links_unless_reading()
        try:
            connection.client.leave(connection.request.engine, self._model.rank)
        except (CoordinatorLostError, DeadlineError) as error:
            logger.debug("left a group whose coordinator is gone: %s", error)

    def _reach(self, request: ConnectRequest) -> CoordinatorClient:
        if self._channel is not None:
            return CoordinatorClient(self._channel)
        ray_session.join(ray_session.RayAddress(request.ray_address, request.ray_auth_mode))
        return CoordinatorClient(RayChannel.find(request.group))

    def _open_links(
        self,
        request: ConnectRequest,
        client: CoordinatorClient,
        plan: Plan,
        landing: Landing,
        opened: contextlib.ExitStack,
    ) -> dict[int, Link]:
        """A link to every trainer rank of the plan. ``opened`` closes them if the connect fails later."""
        transport = make_transport(request.transport)
        reader = f"{request.engine}#{self._model.rank}"
        asked = {
            rank: {
                "reader": reader,
                "transport": request.transport,
                "ranges": [(read.window, read.offset_bytes, read.nbytes) for read in reads],
            }
            for rank, reads in plan.reads.items()
        }
        tickets = client.ask("export", asked, request.timeout_s)
        links: dict[int, Link] = {}
        for rank, ticket in sorted(tickets.items()):
            links[rank] = transport.open(ticket, landing.targets(plan.reads[rank]), trainer_rank=rank)
            opened.callback(links[rank].close)
        return links

    def _report(self, connection: _Connection, attempt: str, outcome: Outcome) -> None:
        try:
            connection.client.report_prepared(connection.request.engine, self._model.rank, attempt, outcome)
        except RdtError as error:
            logger.warning("rank %d cannot report how %s ended: %s", self._model.rank, attempt, error)

    def _connected(self, operation: str) -> _Connection:
        if self._connection is None:
            raise NotConnectedError(operation)
        return self._connection


def _read(connection: _Connection, version: int, timeout_s: float) -> None:
    """Pull every link and assemble reload buffers; the version is checked before and after."""
    connection.client.check_version(version)
    started, connection.read_started_unix_s = time.perf_counter(), time.time()
    deadline = time.monotonic() + timeout_s
    for trainer_rank, link in connection.links.items():
        if connection.is_closed:
            raise NotConnectedError("finish a read")
        pull_started, pull_started_unix_s = time.perf_counter(), time.time()
        link.pull(version, timeout_s=max(0.001, deadline - time.monotonic()))
        connection.link_times[trainer_rank] = (pull_started_unix_s, time.perf_counter() - pull_started)
    connection.landing.fill_reload_buffers()
    connection.read_s = time.perf_counter() - started
    connection.client.check_version(version)


def _describe_links(connection: _Connection) -> list[dict[str, Any]]:
    """What was read from each trainer rank and when: the fields of :class:`rdt_core.report.LinkReport`."""
    return [
        {
            "trainer_rank": rank,
            "transport": connection.request.transport,
            "nbytes": sum(read.nbytes for read in connection.plan.reads[rank]),
            "num_reads": len(connection.plan.reads[rank]),
            "started_unix_s": started_unix_s,
            "seconds": seconds,
        }
        for rank, (started_unix_s, seconds) in connection.link_times.items()
    ]


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
