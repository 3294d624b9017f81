"""A transport inside one process: the fake that takes the same contract tests as the real ones."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import uuid
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.errors import SourceDiedError, TransportError, TransportUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_numbers = itertools.count()


class _Board:
    """Exports of this process by number. Entries leave when their export is closed or collected."""

    def __init__(self) -> None:
        self._exports: weakref.WeakValueDictionary[int, MemoryExport] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._name = uuid.uuid4().hex

    @property
    def process(self) -> str:
        """Names this process; a forked child, which inherits the board, has another name."""
        return f"{self._name}:{os.getpid()}"

    def add(self, export: MemoryExport) -> MemoryTicket:
        with self._lock:
            number = next(_numbers)
            self._exports[number] = export
            return MemoryTicket(self.process, number)

    def find(self, number: int) -> MemoryExport | None:
        with self._lock:
            return self._exports.get(number)


@dataclass(frozen=True, slots=True)
class MemoryTicket:
    """Names an export of one process."""

    process: str
    number: int


_board = _Board()


class MemoryExport:
    """See :class:`rdt_core.transports.base.Export`."""

    def __init__(self, views: Sequence[torch.Tensor]) -> None:
        self._views: tuple[torch.Tensor, ...] | None = tuple(views)
        self.ticket: object = _board.add(self)

    @property
    def views(self) -> tuple[torch.Tensor, ...] | None:
        """The offered memory, or None once closed."""
        return self._views

    def refresh(self, version: int) -> None:
        """Nothing: readers see the memory itself."""

    def close(self) -> None:
        """Stop offering the memory."""
        self._views = None


class MemoryLink:
    """See :class:`rdt_core.transports.base.Link`."""

    def __init__(self, number: int, targets: Sequence[torch.Tensor], trainer_rank: int) -> None:
        self._number: int | None = number
        self._targets = tuple(targets)
        self._trainer_rank = trainer_rank
        shapes = [tuple(target.shape) for target in targets]
        offered = [tuple(view.shape) for view in self._source()]
        if shapes != offered:
            raise TransportError(
                f"targets of {shapes} bytes cannot take an export of {offered} bytes. Both sides must replay "
                "the same plan."
            )

    def _source(self) -> tuple[torch.Tensor, ...]:
        if self._number is None:
            raise TransportError("this link has been closed. Open the ticket again.")
        export = _board.find(self._number)
        if export is None or export.views is None:
            raise SourceDiedError(self._trainer_rank, "its export was closed")
        return export.views

    def pull(self, version: int, *, timeout_s: float) -> None:
        """Copy from the source views into the targets; never waits."""
        del version, timeout_s
        for target, view in zip(self._targets, self._source(), strict=True):
            target.copy_(view)

    def close(self) -> None:
        """Forget the source."""
        self._number = None


class MemoryTransport:
    """See :class:`rdt_core.transports.base.Transport`."""

    name = "memory"
    takes_rows = True
    is_live = True

    def register(self, views: Sequence[torch.Tensor]) -> contextlib.ExitStack:
        """Nothing is registered."""
        del views
        return contextlib.ExitStack()

    def export(self, views: Sequence[torch.Tensor]) -> MemoryExport:
        """Offer live memory to readers of this process."""
        return MemoryExport(views)

    def open(self, ticket: object, targets: Sequence[torch.Tensor], *, trainer_rank: int) -> MemoryLink:
        """Prepare to read an export of this process."""
        if not isinstance(ticket, MemoryTicket):
            raise TransportError(f"{ticket!r} is not a ticket of the memory transport.")
        if ticket.process != _board.process:
            raise TransportUnavailableError(
                self.name,
                f"trainer rank {trainer_rank} is another process",
                "It serves tests inside one process; do not force it.",
            )
        return MemoryLink(ticket.number, targets, trainer_rank)
