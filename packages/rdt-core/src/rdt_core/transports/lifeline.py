"""How a reader on the same host knows that the process whose memory it has mapped is still there.

A mapping outlives its owner: after a crash the bytes are still readable and mean nothing. So every export
listens on a socket of its own that nobody ever accepts from. The reader's connection waits in its queue, and
the kernel breaks it when the listener is closed; a file descriptor of the process tells of its death even
where a forked child has inherited the listener. Looking at both takes microseconds and no answer.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import uuid

_PREFIX = "\0rdt-"
_CONNECT_TIMEOUT_S = 2.0
_CREDENTIALS = struct.Struct("3i")


class LifelineBrokenError(Exception):
    """The process or the export at the other end is gone. Translated by the transport."""


class Anchor:
    """The source's end. One reader may hold on to it.

    Attributes:
        name: what the reader gives to :class:`Lifeline`; valid on this host, in this network namespace.
    """

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(_PREFIX + self.name)
        self._listener.listen(1)

    def close(self) -> None:
        """Let go; the reader's next look finds it broken. Idempotent."""
        self._listener.close()


class Lifeline:
    """The reader's end.

    Args:
        name: of the :class:`Anchor`.

    Raises:
        LifelineBrokenError: no such anchor on this host, or its process is gone.
    """

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_CONNECT_TIMEOUT_S)
            self._socket.connect(_PREFIX + name)
            raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self._process = os.pidfd_open(_CREDENTIALS.unpack(raw)[0])
        except OSError as error:
            self._socket.close()
            raise LifelineBrokenError(str(error)) from error
        self._poll = select.poll()
        # Both report by themselves: the socket its breaking, the process its end.
        self._poll.register(self._socket.fileno(), select.POLLIN)
        self._poll.register(self._process, select.POLLIN)

    def check(self) -> None:
        """Whether the source still offers its memory. Does not block.

        Raises:
            LifelineBrokenError: it does not.
        """
        if not self._process_is_open():
            raise LifelineBrokenError("the link was closed")
        events = dict(self._poll.poll(0))
        if self._process in events:
            raise LifelineBrokenError("its process has ended")
        if events:
            raise LifelineBrokenError("its export was closed")

    def close(self) -> None:
        """Let go. Idempotent."""
        self._socket.close()
        if self._process_is_open():
            with contextlib.suppress(OSError):
                os.close(self._process)
            self._process = -1

    def _process_is_open(self) -> bool:
        return self._process >= 0
