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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rdt_core.errors import MissingTrainerRankError, RdtError, TopologyChangedError
from rdt_core.fan_out import Neighbour, share_bounds
from rdt_core.links import LinkPlan, OpenLinks, open_links
from rdt_core.local_shards import LocalShard, LocalShards
from rdt_core.manifest import TensorSpec
from rdt_core.publisher import WeightPublisher
from rdt_core.region import Region
from rdt_core.row_blocks import Rows
from rdt_core.wire import manifest_from_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from rdt_core.client import CoordinatorClient
    from rdt_core.fan_out import Circle
    from rdt_core.links import Reader
    from rdt_core.manifest import Manifest
    from rdt_core.pacing import Pace
    from rdt_core.probe import ScratchPool

logger = logging.getLogger(__name__)

MEET_TIMEOUT_S = 5.0
"""How long a rank waits for each other of a new circle, beside generation."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One read of a circle.

    Args:
        number: grows with every round of a driver.
        patience_s: for neighbours to have read their shares, in seconds from now.
        deadline: of the whole read, on the monotonic clock, in seconds.
        before_pull: called before every pull, and while one is waited for; raises for a read that is not
            wanted any more.
        pace: of the read.
    """

    number: int
    patience_s: float
    deadline: float
    before_pull: Callable[[], None]
    pace: Pace

    def left_s(self) -> float:
        """Seconds until the deadline, more than 0."""
        return max(0.001, self.deadline - time.monotonic())


class Relay:
    """Used by one reader's thread, holding the connection's lock; :meth:`close` by any.

    Args:
        client: of the group's coordinator.
        reader: this rank.
        landing: its landing memory, flat bytes.
        key: of the landing memory, see :func:`rdt_core.fan_out.landing_key`.
        piece_nbytes: in which its neighbours' shares are read, where reads rest; None for whole shares.
        scratch: to probe neighbours into.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        reader: Reader,
        landing: torch.Tensor,
        key: str,
        piece_nbytes: int | None,
        scratch: ScratchPool,
    ) -> None:
        self._client, self._reader, self._landing = client, reader, landing
        self._key, self._piece_nbytes, self._scratch = key, piece_nbytes, scratch
        self._me = Neighbour(reader.engine, reader.rank)
        self._spec = TensorSpec(key, (landing.numel(),), "uint8")
        self._publisher: WeightPublisher | None = None
        self._circle: Circle = ()
        self._sources: dict[int, _Source] = {}
        self._meetings_left = _MAX_MEETINGS

    def meet(self, circle: Circle, check_wanted: Callable[[], None]) -> bool:
        """Open links to the neighbours of a circle that differs from the last, or lost one since.

        Args:
            circle: this rank's; empty for none.
            check_wanted: called while others are waited for; raises for a read that is not wanted any more.

        Returns:
            Whether they can be read. A circle that failed three times in a row is not tried again.

        Raises:
            VersionError: as ``check_wanted`` raises it.
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
            self._meet(check_wanted)
        except RdtError as error:
            self._part()
            try:
                check_wanted()
            except RdtError:
                self._meetings_left += 1  # it was the driver that gave up
                raise
            logger.warning(
                "rank %d of %s reads all from the trainers, without its neighbours on this node: %s",
                self._reader.rank,
                self._reader.engine,
                error,
            )
        return bool(self._sources)

    def _meet(self, check_wanted: Callable[[], None]) -> None:
        self._offer()
        bounds = share_bounds(self._landing.numel(), len(self._circle))
        for at, neighbour in enumerate(self._circle):
            if neighbour != self._me:
                client = self._client.of_landing(*neighbour)
                manifest = _await_manifest(client, check_wanted)
                if list(manifest.tensors.values()) != [self._spec]:
                    raise TopologyChangedError(neighbour.engine, f"rank {neighbour.rank} lands other bytes")
                self._sources[at] = self._open(client, manifest, bounds[at], bounds[at + 1])

    def _offer(self) -> None:
        if self._publisher is None:
            landing = self._landing
            shard = LocalShard(
                spec=self._spec, region=Region.whole(self._spec.shape), data=landing, owner=self._key
            )
            offered = LocalShards(rank=0, world_size=1, shards=(shard,), locate=lambda: (landing.data_ptr(),))
            mine = self._client.of_landing(*self._me)
            self._publisher = WeightPublisher(mine, offered)

    def _open(self, client: CoordinatorClient, manifest: Manifest, start: int, end: int) -> _Source:
        """Links to a neighbour's share, which is these bytes of the landing memory."""
        topology = client.topology()
        (shard,) = manifest.shards
        planned = LinkPlan(
            ranges=[(shard.window, Rows(shard.offset_bytes + start, end - start))],
            targets=[self._landing[start:end]],
        )
        if self._piece_nbytes is not None:
            planned = planned.cut(self._piece_nbytes)
        reader = replace(self._reader, timeout_s=min(self._reader.timeout_s, MEET_TIMEOUT_S))
        links = open_links(reader, client, [manifest], {manifest.rank: planned}, self._scratch)
        client.join(*self._me, links.describe())
        return _Source(client=client, topology=topology, links=links, nbytes=end - start)

    def withdraw(self) -> None:
        """Have nobody read the landing memory when this returns: it is about to be written. Idempotent.

        Raises:
            SessionError, DeadlineError: the coordinator does not answer, so that nothing may be written.
        """
        if self._publisher is not None:
            self._publisher.release(timeout_s=_WITHDRAW_TIMEOUT_S)

    def share(self, turn: Turn, pull_share: Callable[[int], None]) -> int:
        """Offer the own share, which is there, and bring all others.

        Args:
            turn: of the round.
            pull_share: brings a share, by its place in the circle, from the trainers. Called for those that
                neighbours do not give.

        Returns:
            Bytes that came from neighbours.

        Raises:
            RdtError: as ``turn.before_pull`` and ``pull_share`` raise it.
        """
        self._publish(turn)
        own, count = self._circle.index(self._me), len(self._circle)
        # Everybody begins with the next one, so that nobody is read by all at once. Calls under way overlap.
        begun = {at: self._begin(at, turn) for at in [(own + step) % count for step in range(1, count)]}
        try:
            ended, missing = self._pull_all(begun, turn)
        except BaseException:
            # A neighbour waits for those that it gave leases, before it writes again.
            self._give_back(begun)
            raise
        nbytes = 0
        for at, settle in ended.items():
            if self._has_held(at, settle):
                nbytes += self._sources[at].nbytes
            else:
                missing.append(at)
        for at in missing:
            pull_share(at)
        if not missing:
            self._meetings_left = _MAX_MEETINGS
        return nbytes

    def _pull_all(
        self, begun: dict[int, Callable[[], int] | None], turn: Turn
    ) -> tuple[dict[int, Callable[[], None]], list[int]]:
        """Read every share as soon as it is there; what tells of each whether it held, and those in vain.

        Takes what it has waited for out of ``begun``.
        """
        until = time.monotonic() + turn.patience_s
        missing: list[int] = []
        ended: dict[int, Callable[[], None]] = {}
        while begun:
            at = next(iter(begun))
            turn.before_pull()
            wait = begun.pop(at)
            settle = None if wait is None else self._pull(at, turn, wait)
            if settle is not None:
                ended[at] = settle
            elif at not in self._sources:
                missing.append(at)
            elif time.monotonic() > until:
                self._do_without(at, "it has not read it in time")
                missing.append(at)
            else:
                begun[at] = self._begin(at, turn)
        return ended, missing

    def _give_back(self, begun: Mapping[int, Callable[[], int] | None]) -> None:
        for at, wait in begun.items():
            with contextlib.suppress(RdtError):
                lease = wait() if wait is not None else 0
                if lease and at in self._sources:
                    self._sources[at].client.drop_lease(lease)

    def _publish(self, turn: Turn) -> None:
        try:
            if self._publisher is not None:
                self._publisher.publish(turn.number, awaits_device=False)
        except RdtError as error:
            logger.warning("rank %d cannot offer what it read: %s", self._me.rank, error)

    def _begin(self, at: int, turn: Turn) -> Callable[[], int] | None:
        """Ask for a lease on a neighbour's share; returns what waits for it a while, for 0 in vain."""
        source = self._sources.get(at)
        if source is None:
            return None
        left_s = turn.left_s()
        try:
            return source.client.start_read(
                *self._me, turn.number, source.topology, left_s, min(left_s, turn.patience_s, _LOOK_S)
            )
        except RdtError as error:
            self._do_without(at, str(error))
            return None

    def _pull(self, at: int, turn: Turn, wait: Callable[[], int]) -> Callable[[], None] | None:
        """Read a neighbour's share if it has it; returns what tells whether it held, None without it."""
        try:
            lease = wait()
            return self._pull_under(lease, self._sources[at], turn) if lease else None
        except RdtError as error:
            turn.before_pull()
            self._do_without(at, str(error))
            return None

    def _pull_under(self, lease: int, source: _Source, turn: Turn) -> Callable[[], None]:
        try:
            for links in source.links.by_rank.values():
                for link in links:
                    turn.pace.rest(turn.left_s())
                    turn.before_pull()
                    with turn.pace.moving():
                        link.pull(turn.number, timeout_s=turn.left_s())
        except BaseException:
            # Whatever it is, the neighbour waits for this lease before it writes again.
            with contextlib.suppress(RdtError):
                source.client.drop_lease(lease)
            raise
        return source.client.start_end_read(lease, turn.number)

    def _has_held(self, at: int, settle: Callable[[], None]) -> bool:
        try:
            settle()
        except RdtError as error:
            self._do_without(at, str(error))
            return False
        return True

    def _do_without(self, at: int, reason: str) -> None:
        """Until the circle meets again."""
        logger.info(
            "rank %d reads the share of %s from trainers: %s", self._me.rank, self._circle[at], reason
        )
        source = self._sources.pop(at, None)
        if source is not None:
            self._forget(source)

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
            source.client.leave(*self._me)


def _await_manifest(client: CoordinatorClient, check_wanted: Callable[[], None]) -> Manifest:
    """A neighbour's offer, once it makes one."""
    deadline = time.monotonic() + MEET_TIMEOUT_S
    while True:
        check_wanted()
        try:
            return manifest_from_bytes(client.manifests(_LOOK_S)[0])
        except MissingTrainerRankError:
            if time.monotonic() > deadline:
                raise
