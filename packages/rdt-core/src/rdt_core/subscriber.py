"""The engine's half of weight sync: reads versions from trainer ranks and flips one model to them."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdt_core import ray_session, tracing
from rdt_core.admission import UNCHECKED
from rdt_core.client import CoordinatorClient, RayChannel
from rdt_core.connect_request import ConnectRequest
from rdt_core.connecting import open_connection
from rdt_core.connection import Connection, leave
from rdt_core.describe import typed_view
from rdt_core.digest import RegionDigest, digest_region
from rdt_core.errors import (
    AbortedError,
    CannotLendError,
    EngineAsleepError,
    NotConnectedError,
    NotPreparedError,
    RdtError,
    TopologyChangedError,
)
from rdt_core.fan_out import circle_from_wire
from rdt_core.lending import GRACE_S, Lending, lent_shards
from rdt_core.lifecycle import RankLife, RankState
from rdt_core.words import Outcome

if TYPE_CHECKING:
    from rdt_core.admission import Admission
    from rdt_core.client import Channel
    from rdt_core.engine_model import EngineModel
    from rdt_core.fan_out import Circle

__all__ = ["ConnectRequest", "WeightSubscriber"]

logger = logging.getLogger(__name__)

_WAIT_LOOK_S = 0.25
"""How often a reader that waits for a version to be published looks whether it is still wanted."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One read: its number in :class:`RankLife`, and what was asked of it."""

    number: int
    version: int
    timeout_s: float
    verify: str | None


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
        self._connection: Connection | None = None
        self._life = RankLife()
        self._lending = Lending()
        self._last_commit: dict[str, Any] | None = None
        self._is_awaiting = False

    @property
    def version(self) -> int:
        """The version that the model holds, as the group counted that committed it; 0 before the first.

        It stays when the group begins to count anew, its coordinator and all of its trainers having gone:
        what the model holds is still that.
        """
        return self._life.held.version

    @property
    def rank(self) -> int:
        """This worker's rank in its engine."""
        return self._model.rank

    @property
    def is_torn(self) -> bool:
        """Whether the model holds parts of two versions. The engine must not generate while it does."""
        return self._life.is_torn

    @property
    def is_reading(self) -> bool:
        """Whether bytes are being read. Asked by an engine that can make room for the thread that reads."""
        return self._life.state is RankState.READING and not self._is_awaiting

    def connect(self, request: ConnectRequest) -> dict[str, Any]:
        """Join a group: record the loader, plan the reads, open links to the trainer ranks.

        Blocks for seconds on first use. Replaces an earlier connection. The model is left as it was, whatever
        happens; after an error there is no connection.

        Returns:
            Plain values: version (that the model holds, if the group's present session committed it, else 0),
            rank, world_size, mode, read_share, num_tensors, nbytes, read_nbytes, num_reads, landing_nbytes,
            arena_bytes, reload, trainers and reasons (which transport each trainer rank is read over, and
            why), num_pieces, probe_s, connect_s, awaits_publication (that :meth:`start_prepare` can be called
            before a version is published).

        Raises:
            RdtError: the typed reason; see the README's table.
        """
        started = time.perf_counter()
        self._check_awake("connect")
        self.disconnect()
        client = self._reach(request)
        with contextlib.ExitStack() as undo:
            # Leaving is what makes trainer ranks drop what they export to this one, joined or not.
            undo.callback(leave, client, request.engine, self._model.rank)
            connection = open_connection(request, client, self._model)
            undo.callback(connection.close)
            connect_s = time.perf_counter() - started
            info = {**connection.describe(self._model), "connect_s": connect_s, "awaits_publication": True}
            connection.info = info
            session = client.session()
            client.join(request.engine, self._model.rank, info)
            undo.pop_all()
        self._life.connect(session)
        self._connection = connection
        logger.info(
            "rank %d connected to sync group %s, %s: %d tensors, %d bytes, %d reads, %.2f s",
            self._model.rank,
            request.group,
            connection.mode,
            connection.plan.num_tensors,
            connection.plan.read_nbytes,
            connection.plan.num_reads,
            info["connect_s"],
        )
        return {**info, "version": self._life.committed}

    def prepare(self, version: int, *, timeout_s: float = 60.0, verify: str | None = None) -> dict[str, Any]:
        """Read ``version`` into landing memory. Blocks until it is there; touches no parameter.

        In in-place mode nothing is read before the commit; this checks that there is something to read.

        Raises:
            NotConnectedError, EngineAsleepError: connect first; wake its weights first.
            StaleVersionError: not greater than the committed version.
            NotPublishedError: some trainer rank does not hold it yet.
            SupersededError: a trainer rank published again before the read was done.
            ReleasedError, LeaseLostError: a trainer rank took the version back to write.
            TornReadError: with ``verify="digest"``, the trainer wrote without a word.
            AbortedError: the read was taken back.
            SourceDiedError, PullTimeoutError, TransportError: bytes did not arrive.
        """
        connection = self._connected("prepare")
        attempt = _Attempt(self._life.begin_read(version), version, timeout_s, verify)
        self._gather(connection, attempt, (), 0)
        self._read(connection, attempt)
        return {"version": version, "prepare_s": connection.read_s}

    def start_prepare(
        self,
        version: int,
        attempt: str,
        *,
        timeout_s: float = 60.0,
        verify: str | None = None,
        awaits_publication: bool = False,
        circles: object = None,
        turn: int = 0,
    ) -> None:
        """Begin :meth:`prepare` in a thread and return; the coordinator is told how it ended.

        Args:
            version: to read.
            attempt: the driver's name for this try, under which it waits for the outcome.
            timeout_s: for the read.
            verify: ``"digest"`` to compare what was read with what the trainers hold.
            awaits_publication: wait up to ``timeout_s`` for the version to be published before the read, in
                the thread that reads. Abort, disconnect and another prepare end that wait as they end a read.
            circles: with whom ranks of this engine read together, by rank, see
                :func:`rdt_core.fan_out.circle_from_wire`; all read alone by default.
            turn: of the circles, see :mod:`rdt_core.relay`.

        Raises:
            WireFormatError: the circles are none.
            NotConnectedError, EngineAsleepError: connect first; wake its weights first.
            StaleVersionError: not greater than the committed version.
        """
        connection = self._connected("prepare")
        circle = circle_from_wire(circles or {}, connection.request.engine, self._model.rank)
        begun = _Attempt(self._life.begin_read(version), version, timeout_s, verify)
        parent = tracing.traceparent()

        def read() -> None:
            with tracing.continued("rdt.engine.read", parent, rank=self._model.rank, version=version):
                read_and_report()

        def read_and_report() -> None:
            try:
                self._gather(connection, begun, circle, turn)
                admission = self._await_publication(connection, begun) if awaits_publication else UNCHECKED
                self._read(connection, begun, admission)
                outcome = Outcome({"version": version, "prepare_s": connection.read_s})
            except RdtError as error:
                outcome = Outcome(error=error)
            except Exception as error:
                # Whatever torch or the transport raises must reach the driver, which waits for this outcome.
                logger.warning("rank %d: reading version %d failed", self._model.rank, version, exc_info=True)
                outcome = Outcome(error=RdtError(f"reading failed: {type(error).__name__}: {error}"))
            self._report(connection, attempt, outcome)

        connection.reader.start(read)

    def _await_publication(self, connection: Connection, attempt: _Attempt) -> Admission:
        """Until there is something to read, or the read is not wanted any more, or time is up.

        Says no more of how it ended: the read that follows finds out, and has the errors for it.
        """
        version, timeout_s = attempt.version, attempt.timeout_s
        deadline = time.monotonic() + timeout_s
        self._is_awaiting = True
        try:
            while self._life.is_wanted(attempt.number) and (left_s := deadline - time.monotonic()) > 0:
                admitted = connection.admit(version, timeout_s, min(left_s, _WAIT_LOOK_S))
                if admitted is not None:
                    return admitted
        except RdtError as error:
            # It is the coordinator's, and the read will meet it too.
            logger.debug("rank %d: waiting for version %d failed: %s", self._model.rank, version, error)
        finally:
            self._is_awaiting = False
        return UNCHECKED

    def _gather(self, connection: Connection, attempt: _Attempt, circle: Circle, turn: int) -> None:
        """With whom the read that follows is shared; nobody for an empty circle."""
        try:
            with connection.lock:
                connection.gather(circle, turn, lambda: self._check_wanted(attempt))
        except BaseException:
            # Whatever it is, this rank is not reading any more.
            self._life.fail_read(attempt.number)
            raise
        finally:
            connection.close_when_idle()

    def _check_wanted(self, attempt: _Attempt) -> None:
        self._life.check_wanted(attempt.number, attempt.version)

    def _read(self, connection: Connection, attempt: _Attempt, admission: Admission = UNCHECKED) -> None:
        """Body of a prepare, in the caller's thread or in a reader's."""
        try:
            with connection.lock:
                try:
                    self._check_wanted(attempt)
                except AbortedError:
                    # A read that has begun gives its lease back itself; for this one a trainer would wait.
                    connection.give_up(admission)
                    raise
                self._read_or_check(connection, attempt, admission)
                # What is prepared may be committed at any time, so nobody may read the parameters any more.
                self._lending.take_back(min(attempt.timeout_s, GRACE_S))
                self._life.end_read(attempt.number, attempt.version)
        except BaseException:
            self._life.fail_read(attempt.number)
            raise
        finally:
            connection.close_when_idle()

    def _read_or_check(self, connection: Connection, attempt: _Attempt, admission: Admission) -> None:
        def read(admission: Admission = UNCHECKED) -> None:
            if not connection.is_in_place:
                check_wanted = functools.partial(self._check_wanted, attempt)
                lease = admission.lease
                connection.read(attempt.version, attempt.timeout_s, check_wanted, attempt.verify, lease)
            elif not admission.is_checked:
                connection.check(attempt.version)

        try:
            read(admission)
        except TopologyChangedError as error:
            logger.info("rank %d plans again: %s", self._model.rank, error.detail)
            connection.relink()
            self._life.follow(connection.client.session())
            read()

    def commit(self, version: int, *, timeout_s: float = 60.0, verify: str | None = None) -> dict[str, Any]:
        """Flip the model to a prepared version. Called while the model does not run.

        Staged: by local copies. In place: by reading into the parameters; a read that fails leaves them torn,
        and :attr:`is_torn` stays true until a later commit has brought every byte of one version.

        Args:
            version: as prepared.
            timeout_s: for reading, in in-place mode.
            verify: in in-place mode, as for :meth:`prepare`.

        Returns:
            Plain values: what :meth:`connect` returns, and engine, version, commit_s, prepare_s, links,
            prepare_started_unix_s, commit_started_unix_s. All of it but the times is known before.

        Raises:
            NotConnectedError, EngineAsleepError: connect first; wake its weights first.
            NotPreparedError: this version has not been prepared.
            VersionError, TransportError: in in-place mode, as :meth:`prepare` raises them.
        """
        connection = self._connected("commit")
        # A read that is under way holds the lock; the model's thread must not wait for it.
        if not connection.lock.acquire(blocking=False):
            raise NotPreparedError(version, None)
        started, started_unix_s = time.perf_counter(), time.time()
        try:
            self._life.begin_flip(version)
            try:
                self._flip(connection, version, timeout_s, verify)
            except BaseException:
                self._life.fail_flip()
                raise
            self._life.end_flip()
        finally:
            connection.lock.release()
        if connection.is_borrowing:
            connection.reader.start(functools.partial(_stop_borrowing, connection))
        self._last_commit = {
            **connection.info,
            "engine": connection.request.engine,
            "version": version,
            "commit_s": time.perf_counter() - started,
            "prepare_s": 0.0 if connection.is_in_place else connection.read_s,
            "neighbours_nbytes": connection.neighbours_nbytes,
            "prepare_started_unix_s": connection.read_started_unix_s,
            "commit_started_unix_s": started_unix_s,
            "links": connection.describe_links(),
        }
        return self._last_commit

    def _flip(self, connection: Connection, version: int, timeout_s: float, verify: str | None) -> None:
        if connection.is_in_place:
            # Taking the lease is the last point at which a version that is gone costs nothing.
            connection.read(version, timeout_s, self._life.begin_write, verify)
        self._life.begin_write()
        if connection.landing.reload_buffers:
            self._model.load(list(connection.landing.reload_buffers.items()))
        connection.landing.fill_parameters()
        self._model.finalize()

    def abort(self) -> None:
        """Forget what was prepared; the model keeps serving what it has. Idempotent; waits for no read."""
        self._life.abort()

    def lend(self, version: int) -> None:
        """Let other engines read ``version`` from this model's parameters, from soon after this returns.

        It ends with :meth:`reclaim`, with :meth:`disconnect`, or when the next version has been read: readers
        have ``GRACE_S`` seconds to end then, while generation goes on.

        Raises:
            NotConnectedError, EngineAsleepError: connect first; wake its weights first.
            CannotLendError: the model does not hold just this version, or not in the form of the checkpoint.
        """
        connection = self._connected("lend")
        rank, world_size = self._model.rank, self._model.world_size
        self._check_at_rest(version)
        local = lent_shards(connection.recording, connection.specs, rank=rank, world_size=world_size)
        client = connection.client.of_lender(connection.request.engine)

        def begin() -> None:
            try:
                with connection.lock:
                    self._check_at_rest(version)
                    self._lending.begin(client, local, version)
            except RdtError as error:
                # Whoever wants to read finds nobody, and says so in time.
                logger.warning("rank %d does not lend version %d: %s", rank, version, error)
            finally:
                connection.close_when_idle()

        connection.reader.start(begin)

    def _check_at_rest(self, version: int) -> None:
        reason = self._life.check_at_rest(version)
        if reason is not None:
            raise CannotLendError(self._model.rank, reason)

    def reclaim(self) -> None:
        """Lend nothing any more, from soon after this returns. Idempotent."""
        if self._connection is not None:
            self._connection.reader.start(self._end_lending)

    def _end_lending(self) -> None:
        try:
            self._lending.take_back(0.0)
        except RdtError as error:
            logger.warning("rank %d cannot say that it lends no more: %s", self._model.rank, error)

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
        """Plain values: rank, version, session, group, state, prepared, is_torn, is_asleep, last_commit.

        ``session`` is that of the group when it counted ``version``, empty before the first commit; see
        :mod:`rdt_core.wholeness`. ``last_commit`` is what the last :meth:`commit` returned, or None.
        """
        connection, held = self._connection, self._life.held
        return {
            "rank": self._model.rank,
            "world_size": self._model.world_size,
            "version": held.version,
            "session": held.session,
            "group": connection.request.group if connection else None,
            "mode": connection.mode if connection else None,
            "state": str(self._life.state),
            "prepared": self._life.prepared,
            "is_torn": self._life.is_torn,
            "is_asleep": self._model.is_asleep,
            "last_commit": self._last_commit,
        }

    def disconnect(self, group: str | None = None) -> None:
        """Close all links and leave the group. Idempotent; the model keeps its version.

        Does not wait for a read: one that is under way closes its links when it ends.

        Args:
            group: leave this one only; whatever it is by default. A driver that gave up on a connect does not
                know whether another driver's has come after it.
        """
        connection = self._connection
        if connection is None or group not in (None, connection.request.group):
            return
        self._connection = None
        self._life.disconnect()
        connection.reader.start(self._end_lending)
        connection.close()
        connection.leave()

    def _reach(self, request: ConnectRequest) -> CoordinatorClient:
        if self._channel is not None:
            return CoordinatorClient(self._channel)
        ray_session.join(ray_session.RayAddress(request.ray_address, request.ray_auth_mode))
        return CoordinatorClient(RayChannel.find(request.group))

    def _report(self, connection: Connection, attempt: str, outcome: Outcome) -> None:
        try:
            connection.client.report_prepared(connection.request.engine, self._model.rank, attempt, outcome)
        except RdtError as error:
            logger.warning("rank %d cannot report how %s ended: %s", self._model.rank, attempt, error)

    def _check_awake(self, operation: str) -> None:
        if self._model.is_asleep:
            raise EngineAsleepError(operation)

    def _connected(self, operation: str) -> Connection:
        """For what touches parameters, or promises that they can be touched."""
        if self._connection is None:
            raise NotConnectedError(operation)
        self._check_awake(operation)
        return self._connection


def _stop_borrowing(connection: Connection) -> None:
    """What was borrowed is committed; the next version comes from the trainers. In the reader's thread."""
    with connection.lock:
        connection.stop_borrowing()
