"""All that one engine rank keeps from connect to disconnect: its plan, its memory and its links."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rdt_core import fan_out
from rdt_core.admission import UNCHECKED, Admission
from rdt_core.coordinator import reader_name
from rdt_core.describe import device_name, node_name
from rdt_core.digest import digest_bytes
from rdt_core.errors import (
    CoordinatorLostError,
    DeadlineError,
    ForgottenError,
    RdtError,
    TopologyChangedError,
    TornReadError,
    TransportError,
)
from rdt_core.fan_out import Neighbour
from rdt_core.landing import Landing, make_landing
from rdt_core.link_plans import LinkPlans, LinkUse, plan_links
from rdt_core.links import OpenLinks, Reader, open_links
from rdt_core.meeting import aim_in_place, is_near, meet_trainers, price_reads, reader_of
from rdt_core.mode import INPLACE
from rdt_core.pacing import Pace
from rdt_core.planner import build_plan
from rdt_core.relay import PATIENCE_S, Relay, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from rdt_core.client import CoordinatorClient
    from rdt_core.connect_request import ConnectRequest
    from rdt_core.engine_model import EngineModel
    from rdt_core.fan_out import Circle
    from rdt_core.manifest import Manifest, TensorSpec
    from rdt_core.plan import Plan
    from rdt_core.probe import ScratchPool
    from rdt_core.reader_thread import ReaderThread
    from rdt_core.recording import Recording


logger = logging.getLogger(__name__)

_NONE = "none"
"""The topology of links that are not open, which no group has."""

TRAINERS = "trainers"
"""What a report names as the source of bytes that no engine lent."""


@dataclass(slots=True, kw_only=True)
class Connection:
    """One engine rank's connection. Owned by its subscriber; ``lock`` is held by whoever reads or flips.

    ``client`` reaches the group, ``source`` the coordinator of those who are read: the same, unless another
    engine lends. ``device`` is that of the landing memory. ``is_near`` says that all trainer ranks are on
    this node. ``circle`` is empty for a rank that reads alone.
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
    planned: LinkPlans
    links: OpenLinks
    reader: ReaderThread
    is_near: bool
    scratch: ScratchPool
    circle: Circle = ()
    turn: int = 0
    relay: Relay | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    read_s: float = 0.0
    read_started_unix_s: float = 0.0
    neighbours_nbytes: int = 0
    link_uses: dict[int, LinkUse] = field(default_factory=dict)
    is_closed: bool = False
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def is_in_place(self) -> bool:
        """Whether versions are read into the parameters themselves, at commit."""
        return self.mode == INPLACE

    def admit(self, version: int, timeout_s: float, wait_s: float) -> Admission | None:
        """Wait for a version, and be admitted to it at once: no trainer rank can take it back in between.

        Called by the reader's thread without ``lock``. Blocks, ``wait_s`` seconds at most and for the
        coordinator's answer.

        Args:
            version: to read.
            timeout_s: that the lease lasts, in seconds.
            wait_s: for the version.

        Returns:
            None where waiting is not over. Its lease is for :meth:`read` or :meth:`give_up`; in place, where
            versions are read at commit, there is none. An engine that lends is not asked, nor checked.

        Raises:
            RdtError: nothing can be read; the read that follows finds out for itself.
        """
        if self.is_borrowing:
            return UNCHECKED if self.client.await_published(version, wait_s) else None
        if self.is_in_place:
            is_held = self.source.check_version(version, self.topology, wait_s)
            return Admission(is_checked=True) if is_held else None
        reader = self.request.engine, self.engine_rank
        lease = self.source.begin_read(*reader, version, self.topology, timeout_s, wait_s)
        return Admission(lease, is_checked=True) if lease else None

    def give_up(self, admission: Admission) -> None:
        """What was admitted will not be read."""
        if admission.lease:
            with contextlib.suppress(RdtError):
                self.source.drop_lease(admission.lease)

    def read(
        self,
        version: int,
        timeout_s: float,
        before_pull: Callable[[], None],
        verify: str | None,
        lease: int = 0,
    ) -> None:
        """Bring every byte to its target under a lease, and assemble the reload buffers. Holding ``lock``.

        Args:
            version: that the trainers must hold from before the first byte until after the last.
            timeout_s: for all links together, in seconds; the lease lasts as long.
            before_pull: called before every link's pull; may raise, for a read that is not wanted any more.
                Also called while a neighbour is waited for.
            verify: ``"digest"`` to compare what was read with what the trainers hold, by digests.
            lease: of :meth:`admit`, where there is one.

        Raises:
            VersionError: the trainers do not hold this version throughout, or the read was aborted.
            TransportError: bytes did not arrive.
        """
        lease = lease or self._begin_read(version, timeout_s)
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

    def gather(self, circle: Circle, turn: int, check_wanted: Callable[[], None]) -> None:
        """Make ready to read together with a circle, or alone for an empty one; holding ``lock``.

        Called by the reader's thread before it waits for a version. Nobody reads the landing memory then.
        Blocks for a second where the circle is new. A circle that cannot be met costs a warning only.

        Args:
            circle: of this rank.
            turn: see :mod:`rdt_core.relay`.
            check_wanted: called while others are waited for; raises for a read that is not wanted any more.

        Raises:
            VersionError: as ``check_wanted`` raises it.
            SessionError, DeadlineError: the coordinator does not answer.
        """
        key = str(self.info.get("landing_key", ""))
        if self.relay is None and circle and key:
            buffer = self.landing.buffer
            reader, piece_nbytes = self._link_reader(), self.planned.piece_nbytes
            self.relay = Relay(self.client, reader, buffer, key, piece_nbytes, self.scratch)
        if self.relay is None:
            return
        self.relay.withdraw()
        circle, self.turn = circle if self.relay.meet(circle, check_wanted) else (), turn
        if len(circle) == len(self.circle) or self._cut_links(max(1, len(circle))):
            self.circle = circle

    def _cut_links(self, num_shares: int) -> bool:
        """Links to the trainers again, so that a share can be read by itself; whether they are open."""
        self.circle = ()
        self.links.close()
        # Until they are open again a read has to plan anew, as for trainers that were replaced.
        topology, self.topology = self.topology, _NONE
        try:
            found = meet_trainers(self.client, self.request.timeout_s)
            if found.topology != topology:
                return False
            self._open_links(found.manifests, num_shares)
        except RdtError as error:
            logger.warning("rank %d plans again: %s", self.engine_rank, error)
            return False
        self.topology = topology
        self.info |= self._describe_links()
        self.client.join(self.request.engine, self.engine_rank, self.info)
        return True

    def _open_links(self, manifests: Sequence[Manifest], num_shares: int = 1) -> None:
        rests = self.request.rests_in(self.mode)
        self.planned = plan_links(self.plan, self.landing, num_shares=num_shares, rests=rests)
        reader = self._link_reader()
        self.links = open_links(reader, self.client, manifests, self.planned.by_rank, self.scratch)

    def _link_reader(self) -> Reader:
        return reader_of(self.request, self.engine_rank, self.device)

    def relink(self) -> None:
        """Plan again, and open links again, for trainer processes that took the place of others.

        Called by the reader's thread, holding ``lock``: the recording stands, so the model is not needed.

        Raises:
            TopologyChangedError: the tensors are others too, so that the engine must connect again.
            RdtError: as ``connecting.open_connection`` raises them; the old links are closed then.
        """
        self.stop_borrowing()
        found = meet_trainers(self.client, self.request.timeout_s)
        if found.specs != self.specs:
            raise TopologyChangedError(self.request.group, "their tensors have other names, shapes or dtypes")
        self.links.close()
        self._part()
        cost = price_reads(self.request, self.request.arenas, self.engine_rank, self.device, found.manifests)
        staged = build_plan(self.wanted, found.manifests, cost=cost)
        self.plan = aim_in_place(staged, self.recording, cost) if self.is_in_place else staged
        self.landing = make_landing(self.plan, self.recording, self.specs, self.device)
        self._open_links(found.manifests)
        self.topology, self.is_near = found.topology, is_near(found.manifests)
        self.link_uses.clear()
        self.info |= self._describe_plan()
        self.client.join(self.request.engine, self.engine_rank, self.info)

    def stop_borrowing(self) -> None:
        """Let go of an engine that lends, if it is one that is read. Holding ``lock``; idempotent."""
        if self.is_borrowing:
            self.links.close()
            leave(self.source, self.request.engine, self.engine_rank)
            self.source = self.client

    def _part(self) -> None:
        """Read alone from now on. Landing memory that was offered is offered no more."""
        relay, self.relay, self.circle = self.relay, None, ()
        if relay is not None:
            relay.close()

    def leave(self) -> None:
        """Leave the group, as far as it is still there."""
        for client in {id(client): client for client in (self.source, self.client)}.values():
            leave(client, self.request.engine, self.engine_rank)

    def _pull(self, version: int, timeout_s: float, before_pull: Callable[[], None]) -> None:
        started, self.read_started_unix_s = time.perf_counter(), time.time()
        deadline = time.monotonic() + timeout_s
        pace = Pace(self.request.share_in(self.mode))
        self.link_uses.clear()
        self.neighbours_nbytes = 0

        def pull_share(share: int) -> None:
            self._pull_share(share, version, deadline, before_pull, pace)

        if self.relay is None or not self.circle:
            pull_share(0)
        else:
            pull_share(self.circle.index(Neighbour(self.request.engine, self.engine_rank)))
            patience_s = PATIENCE_S + 4 * (time.perf_counter() - started)
            turn = Turn(
                number=self.turn,
                patience_s=patience_s,
                deadline=deadline,
                before_pull=before_pull,
                pace=pace,
            )
            self.neighbours_nbytes = self.relay.share(turn, pull_share)
        self.landing.fill_reload_buffers()
        self.read_s = time.perf_counter() - started

    def _pull_share(
        self, share: int, version: int, deadline: float, before_pull: Callable[[], None], pace: Pace
    ) -> None:
        """One share from the trainers, all of it where the rank reads alone."""
        if self.links.by_rank.keys() != self.planned.by_rank.keys():
            raise TransportError("this engine's links to the trainers are closed. Connect it again.")
        for trainer_rank, links in self.links.by_rank.items():
            nbytes, num_reads = self.planned.sizes[trainer_rank][share]
            use = self.link_uses.setdefault(trainer_rank, LinkUse(time.time()))
            began = time.perf_counter()
            for link in self.planned.of_share(links, trainer_rank, share):
                pace.rest(deadline - time.monotonic())
                before_pull()
                with pace.moving():
                    link.pull(version, timeout_s=max(0.001, deadline - time.monotonic()))
            use.add(nbytes, num_reads, time.perf_counter() - began)

    def _compare_digests(self, version: int, timeout_s: float) -> None:
        reader = {"reader": reader_name(self.request.engine, self.engine_rank)}
        held = self.source.ask("digest_reads", dict.fromkeys(self.links.by_rank, reader), timeout_s)
        for trainer_rank, planned in self.planned.by_rank.items():
            if held[trainer_rank] != [digest_bytes(target) for target in planned.targets]:
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
                self._part()
                self.scratch.close()
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
            "read_share": self.request.share_in(self.mode),
            "source": self.request.lender if self.is_borrowing else TRAINERS,
            "num_tensors": self.plan.num_tensors,
            "nbytes": self.plan.payload_nbytes,
            "read_nbytes": self.plan.read_nbytes,
            "num_reads": self.plan.num_reads,
            "landing_nbytes": self.landing.nbytes,
            "arena_bytes": self.plan.arena_bytes,
            "reload": dict(self.recording.reload),
            "landing_key": self._landing_key(),
            "landing_device": device_name(self.device),
            **self._describe_links(),
        }

    def _describe_links(self) -> dict[str, Any]:
        return {"num_shares": self.planned.num_shares, **self.links.describe()}

    def _landing_key(self) -> str:
        """What a driver finds ranks by that read together; empty where that is no gain, or not wanted."""
        policy, nbytes = self.request.fan_out, self.landing.buffer.numel()
        if policy == fan_out.NEVER or self.is_in_place or self.is_borrowing or not nbytes:
            return ""
        # Ranks without an accelerator share the memory that their trainers are in, unless that is elsewhere.
        is_worth_it = nbytes >= fan_out.MIN_NBYTES and (self.device.type != "cpu" or not self.is_near)
        if policy == fan_out.AUTO and not is_worth_it:
            return ""
        return fan_out.landing_key(self.plan, f"{node_name()} {self.device.type}")

    def describe_links(self) -> list[dict[str, Any]]:
        """What was read from each trainer rank and when: see :class:`rdt_core.report.LinkReport`."""
        return [
            {
                "trainer_rank": rank,
                "transport": self.links.choices[rank].transport,
                **asdict(use),
            }
            for rank, use in self.link_uses.items()
        ]


def leave(client: CoordinatorClient, engine: str, rank: int) -> None:
    """Leave a group, if it is still there."""
    try:
        client.leave(engine, rank)
    except (CoordinatorLostError, DeadlineError) as error:
        logger.debug("left a group whose coordinator is gone: %s", error)
