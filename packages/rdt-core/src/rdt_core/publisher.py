"""The trainer's half of weight sync: offers live parameters and says when they hold a version."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from rdt_core import ray_session, tracing
from rdt_core.client import CoordinatorClient, RayChannel
from rdt_core.describe import describe_trainer
from rdt_core.digest import RegionDigest, digest_region
from rdt_core.errors import (
    ClosedError,
    CoordinatorLostError,
    DeadlineError,
    ForgottenError,
    GroupInUseError,
    InvalidVersionError,
    RdtError,
    StaleVersionError,
    WindowMovedError,
    WireFormatError,
)
from rdt_core.expandable import refuse_expandable
from rdt_core.exports import Exports
from rdt_core.wire import manifest_to_bytes
from rdt_core.words import LastWords, Outcome, TrainerTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from rdt_core.client import Channel
    from rdt_core.local_shards import LocalShard, LocalShards

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 15.0
_LOST_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Published:
    """When the last version was made ready and told; version 0 before the first."""

    version: int
    started_unix_ns: int
    ended_unix_ns: int


class WeightPublisher:
    """One trainer rank's part in a sync group. Make one with :meth:`attach` in every rank.

    The memory that the optimizer writes is the memory that engines read: nothing is copied, and a version
    is readable from :meth:`publish` until the trainer writes again. Two service threads answer engines: one
    asks for tasks, which is this rank's sign of life, the other carries them out. Both sleep otherwise.
    """

    def __init__(self, client: CoordinatorClient, local: LocalShards) -> None:
        self._client = client
        self._local = local
        refuse_expandable(local)
        self._described = describe_trainer(local)
        self._addresses = tuple(shard.data.data_ptr() for shard in local.shards)
        self._instance = uuid.uuid4().hex
        self._is_closed = threading.Event()
        self._settle: Callable[[], None] = _nothing
        self._introducing = threading.Lock()
        self._is_released = True
        self._published = _Published(0, 0, 0)
        self._manifest = manifest_to_bytes(self._described.manifest)
        self._version = client.attach(local.rank, local.world_size, self._instance, self._manifest)
        self._session = client.session()
        self._exports = Exports(self._described.windows, self._described.manifest.device, self._version)
        self._tasks: queue.SimpleQueue[TrainerTask | None] = queue.SimpleQueue()
        self._threads = (
            threading.Thread(target=self._serve, name=f"rdt-publisher-{local.rank}", daemon=True),
            threading.Thread(target=self._work, name=f"rdt-tasks-{local.rank}", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    @classmethod
    def attach(cls, group: str, local: LocalShards, *, channel: Channel | None = None) -> WeightPublisher:
        """Offer this rank's parameters to a sync group.

        Called once in every trainer rank, in any order, after the model has its final memory (after
        ``fully_shard``, after the optimizer was made). Takes no collective; blocks for a second or two on
        first use while it joins Ray.

        Args:
            group: name of the sync group; the same in every rank, unique in the Ray cluster.
            local: what an exporter found, for instance ``rdt_megatron.fsdp_shards(model)``.
            channel: how to reach the coordinator; by default a named Ray actor, made if there is none.

        Raises:
            NoRayClusterError: there is no Ray cluster to join.
            RayAuthError: the cluster wants another token.
            GroupInUseError: another live process has attached this rank under this name.
            ConfigError: the group's size has no such rank, or other ranks said another size.
            UnsupportedLayoutError: a parameter cannot be described.
        """
        if channel is None:
            ray_session.join()
            channel = RayChannel.create(group)
        publisher = cls(CoordinatorClient(channel), local)
        logger.info(
            "trainer rank %d of %d attached to sync group %s: %d shards, %d bytes",
            local.rank,
            local.world_size,
            group,
            len(local.shards),
            publisher.nbytes,
        )
        return publisher

    @property
    def version(self) -> int:
        """The last version published by this rank; 0 before the first."""
        return self._version

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return self._described.manifest.nbytes

    @property
    def arena_bytes(self) -> int:
        """Bytes held beside the parameters: what engines read packed or cast, and an exporter's copies."""
        return self._exports.arena_bytes + self._local.copied_bytes

    def publish(self, version: int, *, awaits_device: bool = True) -> None:
        """Say that this rank's parameters now hold ``version``, and may be read until they are next written.

        Called in every trainer rank after ``optimizer.step()``. Waits for this device's pending work, then
        tells the coordinator without waiting for its answer; an error in the answer is raised by the next
        publish, and meanwhile no engine takes the version. Takes no collective, unless the exporter says
        that its framework needs one here (``LocalShards.refresh``). A snapshot transport (YR) copies here
        what its engines will read. Where an engine reads arenas, the last version is released (see
        :meth:`release`) and they are filled anew, by copies inside of this device. Nothing else is copied.

        Args:
            version: greater than every version before; the step count will do.
            awaits_device: False where the caller has waited for what wrote the parameters.

        Raises:
            InvalidVersionError: not a positive integer.
            StaleVersionError: not greater than the last one.
            WindowMovedError: a parameter was re-allocated since ``attach``.
            TransportError: a snapshot transport could not take the bytes; the version is not published.
            ClosedError: the publisher was closed.
            CoordinatorLostError: the group's coordinator ended.
        """
        if self._is_closed.is_set():
            raise ClosedError("publisher")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise InvalidVersionError(version)
        if version <= self._version:
            raise StaleVersionError(version, self._version, "published")
        started_unix_ns = time.time_ns()
        if self._local.refresh is not None:
            # It writes what readers of the last version may still be reading.
            self.release()
            self._local.refresh()
        self._check_addresses()
        if awaits_device and self._described.manifest.device.startswith("cuda"):
            torch.cuda.synchronize(self._described.manifest.device)
        self._settle_last()
        if self.arena_bytes:
            # Filling arenas anew is a write: whoever reads the last version there ends first, or is cut off.
            self.release()
        self._exports.refresh(version)
        with self._introducing:
            self._version, self._is_released = version, False
        self._published = _Published(version, started_unix_ns, time.time_ns())
        self._settle = self._start_publish(version)

    def release(self, *, timeout_s: float = 30.0) -> None:
        """Take back what was published, before it is written again. Idempotent.

        Called in every trainer rank; takes no collective. Blocks while engines read, ``timeout_s`` seconds at
        most: then their reads are cut off and end with an error, and the next version is theirs.

        Raises:
            ClosedError: the publisher was closed.
            CoordinatorLostError, DeadlineError: the coordinator does not answer; do not write.
        """
        if self._is_closed.is_set():
            raise ClosedError("publisher")
        self._settle_last()
        if self._is_released:
            return
        with self._introducing:
            self._is_released = True
        try:
            cut_off = self._client.release(self._local.rank, self._instance, timeout_s)
        except ForgottenError:
            # A coordinator that was restarted has no leases, and validates none that its predecessor gave.
            self._introduce()
            cut_off = []
        if cut_off:
            logger.warning(
                "trainer rank %d waited %.1f s for readers of version %d and cut them off: %s",
                self._local.rank,
                timeout_s,
                self._version,
                cut_off,
            )

    @contextlib.contextmanager
    def writing(self, *, timeout_s: float = 30.0) -> Iterator[None]:
        """Around whatever writes the parameters: ``with publisher.writing(): optimizer.step()``.

        Enters as :meth:`release` does. Nothing can be read until the next :meth:`publish`, also when the body
        raises, since it may have written by then.
        """
        self.release(timeout_s=timeout_s)
        yield

    def close(self) -> None:
        """Leave the group. Idempotent; engines keep serving what they committed."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        self._tasks.put(None)
        with contextlib.suppress(RdtError):
            self._client.end_tasks(self._local.rank, self._instance)
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT_S)
        self._exports.close()
        try:
            self._settle_last()
            self._client.detach(self._local.rank, self._instance)
        except (CoordinatorLostError, DeadlineError, ForgottenError, GroupInUseError) as error:
            logger.debug("left a group whose coordinator is gone: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_addresses(self) -> None:
        found = self._local.locate()
        if found == self._addresses:
            return
        for shard, before, now in zip(self._local.shards, self._addresses, found, strict=True):
            if before != now:
                raise WindowMovedError(shard.owner, self._local.rank)

    def _start_publish(self, version: int) -> Callable[[], None]:
        try:
            return self._client.start_publish(self._local.rank, self._instance, version, self.arena_bytes)
        except CoordinatorLostError as error:
            lost = error

        def settle() -> None:
            raise lost

        return settle

    def _settle_last(self) -> None:
        """Wait for the answer to the last publish; repeat it to a coordinator that was restarted."""
        settle, self._settle = self._settle, _nothing
        try:
            settle()
        except (CoordinatorLostError, ForgottenError):
            self._introduce()

    def _introduce(self) -> None:
        """Tell a coordinator that was restarted what this rank had told the one before.

        Holding the lock, so that what it tells is what holds. Blocks until there is a coordinator.

        Raises:
            CoordinatorLostError: there is none any more.
            GroupInUseError: another process has taken this rank's place.
        """
        with self._introducing:
            last = LastWords(self._session, self._version, is_writing=self._is_released)
            self._client.attach(
                self._local.rank, self._local.world_size, self._instance, self._manifest, last
            )

    def _serve(self) -> None:
        """Body of one service thread: fetch tasks until the publisher is closed.

        Whatever is wrong with the coordinator, this rank asks again: Ray may take long to restart it, and a
        rank that gave up would be missed for ever.
        """
        is_lost = False
        while not self._is_closed.is_set():
            try:
                self._serve_once()
                is_lost = False
            except GroupInUseError as error:
                if not self._is_closed.is_set():
                    logger.warning("trainer rank %d stops serving engines: %s", self._local.rank, error)
                return
            except RdtError as error:
                if not (is_lost or self._is_closed.is_set()):
                    logger.warning(
                        "trainer rank %d cannot reach the coordinator and tries again: %s",
                        self._local.rank,
                        error,
                    )
                is_lost = True
                self._is_closed.wait(_LOST_PAUSE_S)

    def _serve_once(self) -> None:
        try:
            for task in self._client.next_tasks(self._local.rank, self._instance, self._version):
                self._tasks.put(task)
        except ForgottenError:
            self._introduce()
            logger.warning("trainer rank %d met a coordinator that was restarted", self._local.rank)

    def _work(self) -> None:
        """Body of the other: carry tasks out one by one. A digest of all weights takes its time."""
        while (task := self._tasks.get()) is not None:
            outcome = self._carry_out(task)
            try:
                self._client.answer(task.number, outcome)
            except RdtError as error:
                # Whoever asked has a deadline of its own, and a task of a lost coordinator asks nobody.
                logger.warning("trainer rank %d cannot answer %s: %s", self._local.rank, task.kind, error)

    def _carry_out(self, task: TrainerTask) -> Outcome:
        try:
            if task.kind == "trace":
                self._trace_publish(task)
                return Outcome()
            if task.kind in self._answers:
                rank = self._local.rank
                with tracing.continued(f"rdt.trainer.{task.kind}", task.traceparent, rank=rank):
                    return Outcome(self._answers[task.kind](task.payload))
        except RdtError as error:
            return Outcome(error=error)
        except Exception as error:
            # Whatever torch, ray or the transport raises must reach the engine that waits for this answer.
            logger.warning("trainer rank %d: task %s failed", self._local.rank, task.kind, exc_info=True)
            reason = f"trainer rank {self._local.rank}: {type(error).__name__}: {error}"
            return Outcome(error=RdtError(reason))
        return Outcome(error=WireFormatError("trainer task", f"unknown kind {task.kind!r}"))

    @property
    def _answers(self) -> Mapping[str, Callable[[Any], object]]:
        """How to carry out each kind of task."""
        return {
            "digest": self._digest,
            "digest_reads": self._exports.digest,
            "drop": self._exports.drop,
            "export": self._exports.open,
            "probe": self._exports.probe,
        }

    def _trace_publish(self, task: TrainerTask) -> None:
        """Add the publish of a version to the trace of its sync, which begins at any time, also later."""
        done = self._published
        if done.version == task.payload:
            tracing.record_span(
                "rdt.trainer.publish",
                done.started_unix_ns,
                done.ended_unix_ns,
                parent=task.traceparent,
                rank=self._local.rank,
                version=done.version,
            )

    def _digest(self, dtypes: dict[str, str]) -> list[RegionDigest]:
        """Digest every local shard of the given tensors, in the dtype the engine holds them in."""
        with torch.no_grad():
            return [
                _digest_shard(shard, dtypes[shard.spec.name])
                for shard in self._local.shards
                if shard.spec.name in dtypes
            ]


def _nothing() -> None:
    """What there is to wait for before the first publish."""


def _digest_shard(shard: LocalShard, dtype: str) -> RegionDigest:
    data = shard.data.detach().to(getattr(torch, dtype))
    return RegionDigest(
        tensor=shard.spec.name,
        start=shard.region.start,
        stop=shard.region.stop,
        dtype=dtype,
        digest=digest_region(data, shard.region, shard.spec.shape),
    )
