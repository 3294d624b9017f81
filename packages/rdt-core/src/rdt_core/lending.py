"""An engine rank's part in lending: what it committed, offered as a trainer rank offers its parameters."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from rdt_core.describe import typed_view
from rdt_core.errors import CannotLendError, GroupInUseError
from rdt_core.local_shards import LocalShard, LocalShards
from rdt_core.publisher import WeightPublisher

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.client import CoordinatorClient
    from rdt_core.manifest import TensorSpec
    from rdt_core.recording import Recording

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long an engine that has read the next version waits, generating, for those who read what it lent."""

_END_TIMEOUT_S = 15.0


class Lending:
    """Offers the live parameters of one engine rank, between two of its commits. Safe in several threads.

    The subscriber that owns it sees to it that nothing writes the parameters while it lends: it takes back
    what it lent before it calls a version prepared, and only what is prepared is committed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._publisher: WeightPublisher | None = None
        self._ending: threading.Thread | None = None

    def begin(self, client: CoordinatorClient, local: LocalShards, version: int) -> None:
        """Offer ``version`` to readers, in place of what was offered before. Blocks for a few calls.

        Raises:
            SessionError, DeadlineError: the coordinator does not answer.
        """
        self.take_back(0.0)
        with self._lock:
            if self._ending is not None:
                # Until it has said that it leaves, this rank's name is taken.
                self._ending.join(_END_TIMEOUT_S)
            publisher = WeightPublisher(client, local)
            try:
                publisher.publish(version)
            except BaseException:
                # Whatever it is, its threads must not outlive it.
                publisher.close()
                raise
            self._publisher = publisher

    def take_back(self, timeout_s: float) -> None:
        """Have nobody read from here when this returns. Idempotent.

        Args:
            timeout_s: how long readers may take to end, in seconds; then their reads fail.

        Raises:
            SessionError, DeadlineError: the coordinator does not answer, so that nobody may write yet.
        """
        with self._lock:
            if self._publisher is None:
                return
            try:
                self._publisher.release(timeout_s=timeout_s)
            except GroupInUseError as error:
                # Another process has this engine's name, so that nobody is sent here any more.
                logger.warning("stopped lending: %s", error)
            publisher, self._publisher = self._publisher, None
            # Its threads end with their request to the coordinator, which may be held open for seconds.
            self._ending = threading.Thread(target=publisher.close, name="rdt-lending-ends", daemon=True)
            self._ending.start()


def lent_shards(
    recording: Recording, specs: Mapping[str, TensorSpec], *, rank: int, world_size: int
) -> LocalShards:
    """What one engine rank can lend: every recorded region, where it lies in the live parameters.

    Args:
        recording: of its loader.
        specs: every tensor of the group.
        rank: of the worker in its engine.
        world_size: ranks of the engine.

    Raises:
        CannotLendError: a tensor is not held in the form of the checkpoint.
    """
    if recording.reload:
        name, operation = min(recording.reload.items())
        raise CannotLendError(rank, f"its loader turns {name} into something else ({operation})")
    shards = tuple(
        LocalShard(
            spec=specs[shard.tensor],
            region=shard.region,
            data=typed_view(
                recording.windows[shard.window],
                shard.dtype,
                shard.region.shape,
                shard.offset_bytes,
                shard.stride_bytes,
            ),
            owner=shard.window,
        )
        for shard in recording.shards
    )
    return LocalShards(
        rank=rank,
        world_size=world_size,
        shards=shards,
        locate=lambda: tuple(shard.data.data_ptr() for shard in shards),
        known=tuple(specs.values()),
    )
