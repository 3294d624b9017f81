"""The states of an engine rank, of its model and of a group's driver, and the events that move them.

Tables first: :data:`RANK_MOVES`, :data:`MODEL_MOVES` and :data:`SYNC_MOVES` are all there is,
docs/reliability.md draws them, and the two classes do nothing but follow them. An event that a table does not
list for a state changes nothing and is refused or ignored, as its method says.
"""

from __future__ import annotations

import threading
from enum import StrEnum
from typing import NamedTuple

from rdt_core.errors import (
    AbortedError,
    BusyError,
    ClosedError,
    NotConnectedError,
    NotPreparedError,
    StaleVersionError,
)


class RankState(StrEnum):
    """What an engine rank is doing about a version."""

    APART = "apart"
    IDLE = "idle"
    READING = "reading"
    PREPARED = "prepared"
    FLIPPING = "flipping"


class ModelState(StrEnum):
    """What the rank's parameters hold."""

    WHOLE = "whole"
    CHANGING = "changing"
    TORN = "torn"


class SyncState(StrEnum):
    """What the driver of a group is doing."""

    IDLE = "idle"
    WAITING = "waiting"
    PREPARING = "preparing"
    COMMITTING = "committing"
    CHANGING = "changing members"
    CLOSED = "closed"


class SyncEvent(StrEnum):
    """What a driver is asked to do, or finds."""

    UPDATE = "update"
    PUBLISHED = "published"
    PREPARED = "prepared"
    FAIL = "fail"
    DONE = "done"
    JOIN = "join or leave"
    CLOSE = "close"


class Event(StrEnum):
    """What happens to a rank or to its model."""

    CONNECT = "connect"
    PREPARE = "prepare"
    READ = "read"
    FAIL = "fail"
    ABORT = "abort"
    COMMIT = "commit"
    WRITE = "write"
    DONE = "done"
    DISCONNECT = "disconnect"


_CONNECTED = (RankState.IDLE, RankState.READING, RankState.PREPARED, RankState.FLIPPING)

RANK_MOVES: dict[tuple[RankState, Event], RankState] = {
    (RankState.APART, Event.CONNECT): RankState.IDLE,
    (RankState.IDLE, Event.PREPARE): RankState.READING,
    (RankState.READING, Event.PREPARE): RankState.READING,
    (RankState.PREPARED, Event.PREPARE): RankState.READING,
    (RankState.READING, Event.READ): RankState.PREPARED,
    (RankState.READING, Event.FAIL): RankState.IDLE,
    (RankState.READING, Event.ABORT): RankState.IDLE,
    (RankState.PREPARED, Event.ABORT): RankState.IDLE,
    (RankState.PREPARED, Event.COMMIT): RankState.FLIPPING,
    (RankState.FLIPPING, Event.DONE): RankState.IDLE,
    (RankState.FLIPPING, Event.FAIL): RankState.IDLE,
    **{(state, Event.DISCONNECT): RankState.APART for state in _CONNECTED},
}
"""An engine rank. A read that was aborted or replaced may still be running; its end is no event any more."""

MODEL_MOVES: dict[tuple[ModelState, Event], ModelState] = {
    (ModelState.WHOLE, Event.WRITE): ModelState.CHANGING,
    (ModelState.CHANGING, Event.DONE): ModelState.WHOLE,
    (ModelState.CHANGING, Event.FAIL): ModelState.TORN,
    (ModelState.TORN, Event.WRITE): ModelState.CHANGING,
}
"""A rank's parameters. They are written only while the rank is flipping; torn ones must not generate."""

SYNC_MOVES: dict[tuple[SyncState, SyncEvent], SyncState] = {
    (SyncState.IDLE, SyncEvent.UPDATE): SyncState.WAITING,
    (SyncState.WAITING, SyncEvent.PUBLISHED): SyncState.PREPARING,
    (SyncState.PREPARING, SyncEvent.PREPARED): SyncState.COMMITTING,
    (SyncState.COMMITTING, SyncEvent.DONE): SyncState.IDLE,
    **{
        (state, SyncEvent.FAIL): SyncState.IDLE
        for state in (SyncState.WAITING, SyncState.PREPARING, SyncState.COMMITTING, SyncState.CHANGING)
    },
    (SyncState.IDLE, SyncEvent.JOIN): SyncState.CHANGING,
    (SyncState.CHANGING, SyncEvent.DONE): SyncState.IDLE,
    **{(state, SyncEvent.CLOSE): SyncState.CLOSED for state in SyncState if state is not SyncState.CLOSED},
}
"""The driver of a group. Whatever fails, it is idle again and the next update is free to begin."""


class SyncLife:
    """The driver's state; refuses what its table does not list. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = SyncState.IDLE

    @property
    def state(self) -> SyncState:
        """What the driver is doing."""
        return self._state

    def move(self, event: SyncEvent) -> None:
        """Follow the table.

        Raises:
            ClosedError: the driver was closed.
            BusyError: it is doing something else, in another thread.
        """
        with self._lock:
            following = SYNC_MOVES.get((self._state, event))
            if following is not None:
                self._state = following
            elif self._state is SyncState.CLOSED:
                raise ClosedError("sync")
            else:
                raise BusyError(str(event), str(self._state))

    def close(self) -> bool:
        """The driver is closed; whether it was open until now."""
        with self._lock:
            was_open, self._state = self._state is not SyncState.CLOSED, SyncState.CLOSED
            return was_open

    def end(self) -> None:
        """Whatever was under way has ended: in failure, unless the table had led to idle before."""
        with self._lock:
            self._state = SYNC_MOVES.get((self._state, SyncEvent.FAIL), self._state)


class Held(NamedTuple):
    """What a model holds.

    Args:
        version: as the group counted; 0 before the first commit.
        session: of the group that counted so. Another one may give the same number to other bytes.
    """

    version: int
    session: str


class RankLife:
    """One engine rank's state. Kept by its subscriber over all connections; safe to use from two threads.

    The thread that runs the model connects, commits, aborts and disconnects; a reader's thread begins and
    ends reads. No method blocks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rank, self._model = RankState.APART, ModelState.WHOLE
        self._attempt = 0
        self._version: int | None = None
        self._session = ""
        self._held = Held(0, "")

    @property
    def state(self) -> RankState:
        """What the rank is doing."""
        return self._rank

    @property
    def committed(self) -> int:
        """The version that the model holds, or held last, if this session of the group gave it; else 0."""
        return self._held.version if self._held.session == self._session else 0

    @property
    def held(self) -> Held:
        """What the model holds, or held last, of whatever session it was."""
        return self._held

    @property
    def prepared(self) -> int | None:
        """The version that may be committed."""
        return self._version if self._rank is RankState.PREPARED else None

    @property
    def is_torn(self) -> bool:
        """Whether the parameters are, or may be, of more than one version."""
        return self._model is not ModelState.WHOLE

    def connect(self, session: str) -> None:
        """The rank joined a group. Versions of another session count no more, though the model holds one.

        Args:
            session: of the group, in which its versions grow.
        """
        with self._lock:
            self._move(Event.CONNECT)
            self._attempt += 1
            self._session = session

    def follow(self, session: str) -> None:
        """The trainers were replaced while the rank was connected, and maybe the session too."""
        with self._lock:
            self._session = session

    def check_at_rest(self, version: int) -> str | None:
        """Why the model may not be read as ``version``; None while it holds that and nothing is under way."""
        with self._lock:
            if self._rank is not RankState.IDLE:
                return f"it is {self._rank}"
            if self._model is not ModelState.WHOLE:
                return f"its model is {self._model}"
            return None if self.committed == version else f"it holds version {self.committed}"

    def begin_read(self, version: int) -> int:
        """A read of ``version`` begins; whatever was read or prepared before is dropped.

        Returns:
            The number of this attempt, for the calls below.

        Raises:
            NotConnectedError: the rank is in no group.
            StaleVersionError: the model holds this version or a later one.
            NotPreparedError: a commit is under way.
        """
        with self._lock:
            if self._rank is RankState.APART:
                raise NotConnectedError("prepare")
            if version <= self.committed:
                raise StaleVersionError(version, self.committed, "committed by this engine")
            if not self._move(Event.PREPARE):
                raise NotPreparedError(version, None)
            self._version = version
            self._attempt += 1
            return self._attempt

    def check_wanted(self, attempt: int, version: int) -> None:
        """Whether a read still counts. Called by the reader between its steps.

        Raises:
            AbortedError: it was aborted, or another read took its place.
        """
        if not self.is_wanted(attempt):
            raise AbortedError(version)

    def is_wanted(self, attempt: int) -> bool:
        """Whether a read still counts. Asked by a reader that waits for its version to be published."""
        return self._attempt == attempt and self._rank is RankState.READING

    def end_read(self, attempt: int, version: int) -> None:
        """Every byte of the version has landed.

        Raises:
            AbortedError: the read does not count any more; nothing is prepared.
        """
        with self._lock:
            self.check_wanted(attempt, version)
            self._move(Event.READ)

    def fail_read(self, attempt: int) -> None:
        """The read failed. Ignored when it did not count any more."""
        with self._lock:
            if self._attempt == attempt:
                self._move(Event.FAIL)

    def abort(self) -> None:
        """Drop what is being read or was prepared. Idempotent."""
        with self._lock:
            if self._move(Event.ABORT):
                self._attempt += 1

    def begin_flip(self, version: int) -> None:
        """The model is about to take the prepared version.

        Raises:
            NotConnectedError: the rank is in no group.
            NotPreparedError: this version is not prepared.
        """
        with self._lock:
            if self._rank is RankState.APART:
                raise NotConnectedError("commit")
            if self._rank is not RankState.PREPARED or self._version != version:
                raise NotPreparedError(version, self.prepared)
            self._move(Event.COMMIT)

    def begin_write(self) -> None:
        """The first byte of a parameter is about to change."""
        with self._lock:
            self._move_model(Event.WRITE)

    def end_flip(self) -> None:
        """The model holds every byte of the version."""
        with self._lock:
            self._move_model(Event.DONE)
            self._move(Event.DONE)
            if self._version is not None:
                self._held = Held(self._version, self._session)

    def fail_flip(self) -> None:
        """The flip failed; the model is torn if a byte had changed."""
        with self._lock:
            self._move_model(Event.FAIL)
            self._move(Event.FAIL)

    def disconnect(self) -> None:
        """The rank left its group; the model keeps what it has. Idempotent."""
        with self._lock:
            self._move(Event.DISCONNECT)
            self._attempt += 1

    def _move(self, event: Event) -> bool:
        """Follow the rank's table; whether it lists the event for the present state."""
        following = RANK_MOVES.get((self._rank, event))
        if following is None:
            return False
        self._rank = following
        return True

    def _move_model(self, event: Event) -> None:
        self._model = MODEL_MOVES.get((self._model, event), self._model)
