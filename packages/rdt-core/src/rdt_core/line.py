"""The coordinator's direct line: the calls of a sync over TCP, beside Ray.

A call of a Ray actor takes a millisecond or more, and a sync makes half a dozen one after the other. The same
call takes a twentieth of that here. Members learn the address and a secret through Ray, which has checked who
they are; whoever connects must send the secret first. Values cross as msgpack, so nothing that arrives can
run code. What carries Ray object refs, or is called once, stays with Ray. Trainer ranks ask for their tasks
here too: a call of an actor takes it a millisecond of processor time, and an idle group makes one a rank
every two seconds.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import secrets
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack

from rdt_core import tracing
from rdt_core.error_wire import from_wire, to_wire
from rdt_core.errors import CoordinatorLostError, DeadlineError, RdtError
from rdt_core.words import Outcome, TrainerTask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rdt_core.coordinator import Coordinator

METHODS = frozenset(
    {
        "await_published",
        "begin_read",
        "check_version",
        "drop_lease",
        "end_read",
        "next_tasks",
        "publish",
        "record",
        "release",
        "report_prepared",
        "wait_prepared",
        "wait_published",
    }
)
"""What may be called here: methods of plain values, on the way of a sync or called all the time."""

_OF_LENDER = "of_lender"


def is_taken(method: Any, args: Sequence[object]) -> bool:
    """Whether a call may come here: a method of ``METHODS``, or one of those at what an engine lends.

    See :meth:`rdt_core.peers.GroupCoordinator.of_lender`.
    """
    if method == _OF_LENDER:
        return len(args) > 1 and args[1] in METHODS
    return method in METHODS


_SECRET_BYTES = 32
_MAX_FRAME_BYTES = 1 << 20
_MAX_DEPTH = 32
_CONNECT_TIMEOUT_S = 3.0
_BACKLOG = 4096
"""All ranks of a group may connect at once. Whoever the system does not queue tries again after a second."""
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class LineAddress:
    """Where a coordinator answers, and what it wants to hear first. Passed through Ray only."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class LineServer:
    """The coordinator's end. Lives on the event loop of its actor, as long as the actor.

    Args:
        coordinator: whose methods are called.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()

    async def listen(self, host: str) -> LineAddress:
        """Begin to answer at this address of the node, once; returns where. Idempotent."""
        async with self._starting:
            if self._server is None:
                self._server = await asyncio.start_server(self._serve, host, 0, backlog=_BACKLOG)
        return LineAddress(host, self._server.sockets[0].getsockname()[1], self._secret)

    async def close(self) -> None:
        """Take no new connection. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if hmac.compare_digest(await reader.readexactly(_SECRET_BYTES), self._secret):
                await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # whoever called is gone
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            (nbytes,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            if nbytes > _MAX_FRAME_BYTES:
                return
            writer.write(_frame(await self.answer(await reader.readexactly(nbytes))))
            await writer.drain()

    async def answer(self, request: bytes) -> Any:
        """What one frame's call returns, or the error that it ends with. Takes any bytes; raises nothing."""
        try:
            method, args, traceparent = unpack(request)
            if is_taken(method, args):
                return await self._coordinator.call(method, args, str(traceparent))
        except RdtError as error:
            return error
        except (TypeError, ValueError) as error:
            return RdtError(f"the coordinator cannot take this call: {type(error).__name__}: {error}.")
        return RdtError(
            f"the coordinator's line has no method {method!r}. Run one rdt-core version everywhere."
        )


class Line:
    """A member's end. Any thread may call; every call under way has a connection of its own.

    Args:
        address: from the coordinator.
        group: named in errors.

    Raises:
        OSError: the address cannot be reached from here.
    """

    def __init__(self, address: LineAddress, group: str) -> None:
        self._address, self._group = address, group
        self._idle = [self._connect()]

    def start(self, method: str, *args: object) -> Callable[[float], Any]:
        """Send a call; returns what waits for its result, given a deadline in seconds.

        Raises:
            CoordinatorLostError: nobody answers there any more.
        """
        try:
            connection = self._take()
            connection.sendall(_frame([method, list(args), tracing.traceparent()]))
        except OSError as error:
            raise CoordinatorLostError(self._group, f"its line is broken: {error}") from error
        return functools.partial(self._finish, connection, method)

    def _finish(self, connection: socket.socket, method: str, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        try:
            (nbytes,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline))
            answer = unpack(_receive(connection, nbytes, deadline))
        except TimeoutError:
            connection.close()
            what = f"the coordinator of group {self._group!r} to answer {method}"
            raise DeadlineError(what, timeout_s, "Look for a stopped Ray node or actor.") from None
        except OSError as error:
            connection.close()
            raise CoordinatorLostError(self._group, f"its line is broken: {error}") from error
        self._idle.append(connection)
        if isinstance(answer, RdtError):
            raise answer
        return answer

    def _take(self) -> socket.socket:
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def _connect(self) -> socket.socket:
        where = (self._address.host, self._address.port)
        connection = socket.create_connection(where, timeout=_CONNECT_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(self._address.secret)
        return connection

    def close(self) -> None:
        """Close the connections that no call holds. Idempotent."""
        while self._idle:
            self._idle.pop().close()


def pack(value: object) -> bytes:
    """Plain values, tuples, outcomes, tasks and our errors, as bytes.

    Raises:
        TypeError: a value is of another kind.
    """
    packed: bytes = msgpack.packb(value, default=_encode, strict_types=True)
    return packed


def unpack(raw: bytes) -> Any:
    """What :func:`pack` packed.

    Raises:
        ValueError: it did not.
    """
    return _unpack(raw, 0)


def _unpack(raw: bytes, depth: int) -> Any:
    # Every level is a call of msgpack's C code, whose stack nothing else guards.
    if depth > _MAX_DEPTH:
        raise ValueError(f"values are nested more than {_MAX_DEPTH} deep")
    return msgpack.unpackb(raw, ext_hook=functools.partial(_decode, depth + 1), strict_map_key=False)


_TUPLE, _ERROR, _OUTCOME, _TASK = 1, 2, 3, 4


def _encode(value: object) -> msgpack.ExtType:
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, pack(list(value)))
    if isinstance(value, RdtError):
        return msgpack.ExtType(_ERROR, msgpack.packb(to_wire(value)))
    if isinstance(value, Outcome):
        return msgpack.ExtType(_OUTCOME, pack([value.value, value.error]))
    if isinstance(value, TrainerTask):
        return msgpack.ExtType(_TASK, pack([value.number, value.kind, value.payload, value.traceparent]))
    raise TypeError(f"{type(value).__name__} does not cross the coordinator's line")


def _decode(depth: int, code: int, raw: bytes) -> object:
    if code == _TUPLE:
        return tuple(_unpack(raw, depth))
    if code == _ERROR:
        return from_wire(msgpack.unpackb(raw))
    if code == _OUTCOME:
        return Outcome(*_unpack(raw, depth))
    if code == _TASK:
        return TrainerTask(*_unpack(raw, depth))
    raise ValueError(f"unknown kind {code} of value")


def _frame(value: object) -> bytes:
    body = pack(value)
    return _LENGTH.pack(len(body)) + body


def _receive(connection: socket.socket, nbytes: int, deadline: float) -> bytes:
    received = b""
    while len(received) < nbytes:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(nbytes - len(received))
        if not part:
            raise ConnectionResetError("closed at the other end")
        received += part
    return received
