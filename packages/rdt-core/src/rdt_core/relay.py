"""An engine rank's part in a circle: it offers what it landed, and reads what its neighbours landed.

An offer is what a trainer rank makes of its parameters, made of landing memory: a publisher with a
coordinator of its own, leases included. What it publishes is not the group's version but the *turn*, a number
that grows with every round of a driver: a neighbour that is still at an earlier round finds nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.errors import RdtError, TopologyChangedError
from rdt_core.fan_out import share_bounds
from rdt_core.links import LinkPlan, OpenLinks, open_links
from rdt_core.local_shards import LocalShard, LocalShards
from rdt_core.manifest import TensorSpec
from rdt_core.publisher import WeightPublisher
from rdt_core.region import Region
from rdt_core.wire import manifest_from_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from rdt_core.client import CoordinatorClient
    from rdt_core.fan_out import Circle, Neighbour
    from rdt_core.links import Reader
    from rdt_core.pacing import Pace

logger = logging.getLogger(__name__)

MEET_TIMEOUT_S = 10.0
"""How long a rank waits for the others of a new circle, beside generation."""

PATIENCE_S = 2.0
"""How long a rank waits for a neighbour's share, on top of four times what its own took."""

_WITHDRAW_TIMEOUT_S = 5.0
_LOOK_S = 0.25
_MAX_MEETINGS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A neighbour that can be read.

    Args:
        client: of the coordinator of what it landed.
        topology: that it had when the links were opened.
        links: to its share.
        nbytes: of its share.
    """

    client: CoordinatorClient
    topology: str
    links: OpenLinks
    nbytes: int


class Relay:
    """Used by one reader's thread, holding the connection's lock; :meth:`close` by any.

    Args:
        client: of the group's coordinator.
        reader: this rank.
        landing: its landing memory, flat bytes.
        key: of the landing memory, see :func:`rdt_core.fan_out.landing_key`.
        piece_nbytes: in which its neighbours' shares are read, where reads rest; None for whole shares.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        reader: Reader,
        landing: torch.Tensor,
        key: str,
        piece_nbytes: int | None,
    ) -> None:
        self._client, self._reader, self._landing = client, reader, landing
        self._key, self._piece_nbytes = key, piece_nbytes
        self._publisher: WeightPublisher | None = None
        self._circle: Circle = ()
        self._sources: dict[int, _Source] = {}
        self._meetings_left = _MAX_MEETINGS

    def meet(self, circle: Circle) -> bool:
        """Open links to the neighbours of a circle that differs from the last, or lost one since.

        Returns:
            Whether they can be read. A circle that failed three times is not tried again.
        """
        if circle != self._circle:
            self._circle, self._meetings_left = circle, _MAX_MEETINGS
            self._part()
        if not circle:
            return False
        if len(self._sources) == len(circle) - 1:
            return True
        if not self._meetings_left:
            return False
        self._meetings_left -= 1
        self._part()
        try:
            self._meet()
        except RdtError as error:
            logger.warning(
                "rank %d of %s reads all from the trainers, without its neighbours on this node: %s",
                self._reader.rank,
                self._reader.engine,
                error,
            )
            self._part()
        return bool(self._sources)

    def _meet(self) -> None:
        self._offer()
        bounds = share_bounds(self._landing.numel(), len(self._circle))
        for at, neighbour in enumerate(self._circle):
            if neighbour != (self._reader.engine, self._reader.rank):
                self._sources[at] = self._open(neighbour, bounds[at], bounds[at + 1])

    def _offer(self) -> None:
        if self._publisher is None:
            landing, nbytes = self._landing, self._landing.numel()
            shard = LocalShard(
                spec=TensorSpec(self._key, (nbytes,), "uint8"),
                region=Region.whole((nbytes,)),
                data=landing,
                owner=self._key,
            )
            offered = LocalShards(rank=0, world_size=1, shards=(shard,), locate=lambda: (landing.data_ptr(),))
            mine = self._client.of_landing(self._reader.engine, self._reader.rank)
            self._publisher = WeightPublisher(mine, offered)

    def _open(self, neighbour: Neighbour, start: int, end: int) -> _Source:
        client = self._client.of_landing(neighbour.engine, neighbour.rank)
        manifest = manifest_from_bytes(client.manifests(MEET_TIMEOUT_S)[0])
        topology = client.topology()
        if list(manifest.tensors.values()) != [TensorSpec(self._key, (self._landing.numel(),), "uint8")]:
            raise TopologyChangedError(neighbour.engine, f"rank {neighbour.rank} lands other bytes")
        (shard,) = manifest.shards
        planned = LinkPlan(
            ranges=[(shard.window, shard.offset_bytes + start, end - start)],
            targets=[self._landing[start:end]],
        )
        if self._piece_nbytes is not None:
            planned = planned.cut(self._piece_nbytes)
        links = open_links(self._reader, client, [manifest], {manifest.rank: planned})
        client.join(self._reader.engine, self._reader.rank, links.describe())
        return _Source(client=client, topology=topology, links=links, nbytes=end - start)

    def withdraw(self) -> None:
        """Have nobody read the landing memory when this returns: it is about to be written. Idempotent.

        Raises:
            SessionError, DeadlineError: the coordinator does not answer, so that nothing may be written.
        """
        if self._publisher is not None:
            self._publisher.release(timeout_s=_WITHDRAW_TIMEOUT_S)

    def publish(self, turn: int) -> None:
        """Let neighbours read this rank's share, which is there. Never raises: they do without."""
        try:
            if self._publisher is not None:
                self._publisher.publish(turn, awaits_device=False)
        except RdtError as error:
            logger.warning("rank %d cannot offer what it read: %s", self._reader.rank, error)

    def read(self, at: int, turn: int, timeout_s: float, before_pull: Callable[[], None], pace: Pace) -> int:
        """Read the share of the neighbour that is ``at`` this place of the circle, once it has it.

        Returns:
            Bytes that were read: all of the share, or 0 where the neighbour does not give it, whose share is
            then to be read from the trainers.

        Raises:
            VersionError: as ``before_pull`` raises it.
        """
        source = self._sources.get(at)
        if source is None:
            return 0
        deadline = time.monotonic() + timeout_s
        try:
            if self._await_turn(source, turn, deadline, before_pull):
                self._pull(source, turn, deadline, before_pull, pace)
                return source.nbytes
            reason = "it has not read its share in time"
        except RdtError as error:
            before_pull()
            reason = str(error)
        logger.info("%s: its share is read from the trainers: %s", self._circle[at], reason)
        self._forget(self._sources.pop(at))
        return 0

    def _await_turn(
        self, source: _Source, turn: int, deadline: float, before_pull: Callable[[], None]
    ) -> bool:
        while (left_s := deadline - time.monotonic()) > 0:
            before_pull()
            if source.client.await_published(turn, min(left_s, _LOOK_S)):
                return True
        return False

    def _pull(
        self, source: _Source, turn: int, deadline: float, before_pull: Callable[[], None], pace: Pace
    ) -> None:
        def left_s() -> float:
            return max(0.001, deadline - time.monotonic())

        engine, rank = self._reader.engine, self._reader.rank
        lease = source.client.begin_read(engine, rank, turn, source.topology, left_s())
        try:
            for links in source.links.by_rank.values():
                for link in links:
                    pace.rest(left_s())
                    before_pull()
                    with pace.moving():
                        link.pull(turn, timeout_s=left_s())
        except BaseException:
            with contextlib.suppress(RdtError):
                source.client.drop_lease(lease)
            raise
        source.client.end_read(lease, turn)

    def close(self) -> None:
        """Let go of the neighbours and offer nothing any more. Idempotent; waits for nobody.

        Neighbours that read meanwhile notice that the offer is gone.
        """
        sources, self._sources = list(self._sources.values()), {}
        publisher, self._publisher = self._publisher, None
        for source in sources:
            source.links.close()

        def end() -> None:
            for source in sources:
                self._forget(source)
            if publisher is not None:
                publisher.close()

        if sources or publisher is not None:
            threading.Thread(target=end, name="rdt-relay-ends", daemon=True).start()

    def _part(self) -> None:
        sources, self._sources = list(self._sources.values()), {}
        for source in sources:
            self._forget(source)

    def _forget(self, source: _Source) -> None:
        source.links.close()
        with contextlib.suppress(RdtError):
            source.client.leave(self._reader.engine, self._reader.rank)
