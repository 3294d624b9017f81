"""Real bytes over a link before its first sync, so that a transport that brings wrong ones is refused.

A trainer rank exports a scratch buffer, never a parameter, through the transport object that its real
exports will use, and fills it with bytes that both sides can compute. The engine rank pulls them, compares
every byte, and does the same again after the trainer has written others: what brought old bytes, none, or
bytes beside the targets shows itself in one of the two rounds.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from typing import TYPE_CHECKING

import torch

from rdt_core.errors import TransportLiesError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rdt_core.transports.base import Export, Link, Transport

ROUNDS = (1, 2)
"""The versions that a probe publishes and pulls, in order."""

SIZES = (2, 4098, 65_536)
"""Bytes of the views: the smallest element there is, more than a page by one element, and many pages."""

_GAP_NBYTES = 64
_UNTOUCHED = 0xA5


class Scratch:
    """A buffer to probe from or into, registered with a transport from its first probe to its ``close``.

    Args:
        transport: that the probes will use.
        device: where the memory is that will be read, or landed in.
    """

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self.serves = transport.name, device
        self.buffer = _blank(device)
        self.views = _views(self.buffer)
        self._registered = transport.register([self.buffer])

    def close(self) -> None:
        """Let the buffer go. Idempotent."""
        self._registered.close()


class ScratchPool:
    """The scratch buffers of one side, each kept for the next probe over its transport. Safe in threads.

    Ray tells everybody who has read a process of every deregistration in it, and they connect to it anew,
    each leaving a socket behind on both sides (Ray 2.60, nixl 1.5.1). Engines that read together are read
    themselves, so neither side lets go of a buffer with its probe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Scratch] = []

    def take(self, transport: Transport, device: torch.device) -> Scratch:
        """A buffer for one probe at a time; give it back."""
        with self._lock:
            for at, scratch in enumerate(self._idle):
                if scratch.serves == (transport.name, device):
                    return self._idle.pop(at)
        return Scratch(transport, device)

    def give(self, scratch: Scratch) -> None:
        """Of :meth:`take`, for another probe."""
        with self._lock:
            self._idle.append(scratch)

    @contextlib.contextmanager
    def lend(self, transport: Transport, device: torch.device) -> Iterator[Scratch]:
        """A buffer to probe into. After a failure, bytes may come late: it is let go then, not kept."""
        scratch = self.take(transport, device)
        with contextlib.ExitStack() as undo:
            undo.callback(scratch.close)
            yield scratch
            undo.pop_all()
        self.give(scratch)

    def close(self) -> None:
        """Let every buffer go that was given back. Idempotent."""
        with self._lock:
            idle, self._idle = self._idle, []
        for scratch in idle:
            scratch.close()


class ProbeSource:
    """A trainer rank's side of one link's probe. Used in the publisher's service thread only.

    Args:
        transport: that the link will use.
        scratch: to write and export; no other probe may use it meanwhile.
    """

    def __init__(self, transport: Transport, scratch: Scratch) -> None:
        self.scratch = scratch
        self._export: Export = transport.export(scratch.views)
        self._is_ticket_given = False

    def write(self, secret: str, version: int) -> object:
        """Fill the scratch buffer with the bytes of this round and refresh.

        Returns:
            The ticket in the first round, then None: Ray forgets the targets of a ref that arrives again.
        """
        for view, expected in zip(self.scratch.views, _expected(secret), strict=True):
            # From pageable memory: this returns when the bytes are on the device.
            view.copy_(expected)
        self._export.refresh(version)
        ticket = None if self._is_ticket_given else self._export.ticket
        self._is_ticket_given = True
        return ticket

    def close(self) -> None:
        """Stop offering the buffer, which another probe may use then. Idempotent."""
        self._export.close()


class ProbeTarget:
    """An engine rank's side of one link's probe. Used in the thread that connects.

    Args:
        transport: that the link will use.
        scratch: to land in; no other probe may use it meanwhile.
        ticket: from :meth:`ProbeSource.write`.
        trainer_rank: named in errors.
        timeout_s: for each pull, in seconds.
    """

    def __init__(
        self, transport: Transport, scratch: Scratch, ticket: object, *, trainer_rank: int, timeout_s: float
    ) -> None:
        self._buffer, self._name = scratch.buffer, transport.name
        self._trainer_rank, self._timeout_s = trainer_rank, timeout_s
        self._link: Link = transport.open(ticket, scratch.views, trainer_rank=trainer_rank)
        self._before: list[torch.Tensor] = []

    def check(self, secret: str, version: int) -> None:
        """Pull one round and compare every byte of the targets and around them.

        Raises:
            TransportLiesError: the pull returned, and some byte is not what it should be.
            TransportError: the pull failed.
        """
        self._buffer.fill_(_UNTOUCHED)
        self._link.pull(version, timeout_s=self._timeout_s)
        landed, expected = self._buffer.cpu(), _expected(secret)
        fault = _find_fault(landed, expected, self._before)
        if fault is not None:
            raise TransportLiesError(self._name, self._trainer_rank, fault)
        self._before = expected

    def close(self) -> None:
        """Close the probe's link. Idempotent."""
        self._link.close()


def _find_fault(
    landed: torch.Tensor, expected: Sequence[torch.Tensor], before: Sequence[torch.Tensor]
) -> str | None:
    """What is wrong with the bytes that landed, in words, or None."""
    views = _views(landed)
    num_wrong = sum(int((view != want).sum()) for view, want in zip(views, expected, strict=True))
    if num_wrong:
        if all(bool((view == _UNTOUCHED).all()) for view in views):
            return "left its targets as they were"
        if before and all(torch.equal(view, old) for view, old in zip(views, before, strict=True)):
            return "brought the bytes of an earlier version"
        return f"brought {num_wrong} wrong bytes of {sum(SIZES)}"
    around = landed.clone()
    for view in _views(around):
        view.fill_(_UNTOUCHED)
    num_beside = int((around != _UNTOUCHED).sum())
    return f"wrote {num_beside} bytes beside its targets" if num_beside else None


def _blank(device: torch.device) -> torch.Tensor:
    nbytes = sum(SIZES) + _GAP_NBYTES * (len(SIZES) + 1) + _GAP_NBYTES * len(SIZES)
    return torch.full((nbytes,), _UNTOUCHED, dtype=torch.uint8, device=device)


def _views(buffer: torch.Tensor) -> list[torch.Tensor]:
    """The probe's views of a buffer from :func:`_blank`: aligned, with a gap before, between and after."""
    views, offset = [], _GAP_NBYTES
    for size in SIZES:
        views.append(buffer[offset : offset + size])
        offset += -(-size // _GAP_NBYTES) * _GAP_NBYTES + _GAP_NBYTES
    return views


def _expected(secret: str) -> list[torch.Tensor]:
    """The bytes of one round, the same on both sides; no two rounds share a secret."""
    data = bytearray(hashlib.shake_256(secret.encode()).digest(sum(SIZES)))
    return list(torch.split(torch.frombuffer(data, dtype=torch.uint8), list(SIZES)))
