"""The seam between the sync protocol and the machinery that moves bytes.

A trainer rank *exports* byte ranges of its live memory, once for each engine rank, and passes the ticket
through the coordinator. The engine rank *opens* the ticket onto its own landing memory, once. From then on
the trainer rank *refreshes* the export at every version that it publishes, and the engine rank *pulls* it.

Two kinds of transport fit behind this. A *window* reads live memory: its refresh does nothing, and a pull
brings what the source holds now. A *snapshot store* copies at refresh, and a pull brings that copy. Either
way, a pull of the version that was refreshed last brings that version's bytes, as long as the trainer has not
written since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Sequence

    import torch


class Export(Protocol):
    """A trainer rank's side of one (trainer rank, engine rank) pair.

    Attributes:
        ticket: what the engine rank opens. Sent once; crosses processes inside Ray only, never over HTTP.
    """

    ticket: object

    def refresh(self, version: int) -> None:
        """Make what the memory holds now readable as ``version``.

        Called for every version: by ``publish``, in the trainer's thread, once the device has done its work
        and before anyone is told of the version, of a live transport only for what holds the windows; and
        once after :meth:`Transport.export`, in the service thread, with the last version published (0 before
        the first). Never in both at once. Live windows do nothing.

        Raises:
            TransportError: the bytes cannot be offered; the version is then not published.
        """

    def close(self) -> None:
        """Stop offering the memory. Idempotent. A later pull fails; it never brings other bytes."""


class Link(Protocol):
    """An engine rank's side of one pair."""

    def pull(self, version: int, *, timeout_s: float) -> None:
        """Read every byte of the export into the targets given at ``open``. Blocks without holding the GIL.

        After an error the targets may hold a mix of old and new bytes.

        Args:
            version: the last one the export was refreshed with. A live window has no other and does not look.
            timeout_s: for the whole read, in seconds.

        Raises:
            SourceDiedError: the trainer process ended.
            PullTimeoutError: not done within ``timeout_s`` seconds.
            TransportError: anything else that kept bytes from arriving.
        """

    def close(self) -> None:
        """Forget the source. Idempotent."""


class Transport(Protocol):
    """One way to move bytes. Both sides of a pair must use the same one.

    Attributes:
        name: as shown to users and as accepted by :func:`rdt_core.transports.make_transport`.
        takes_rows: whether views and targets may be of several rows.
        is_live: whether pulls read live memory. A refresh copies nothing then, and at most looks whether the
            memory is where it was; a publish asks that once of every window, not of every reader's export.
    """

    name: str
    takes_rows: bool
    is_live: bool

    def register(self, views: Sequence[torch.Tensor]) -> contextlib.ExitStack:
        """Have memory stay registered, whatever exports and links of it come and go, until this is closed.

        For memory that is used again and again. Where nothing is registered there is nothing to close.
        """

    def export(self, views: Sequence[torch.Tensor]) -> Export:
        """Offer live memory to one engine rank.

        Called in the trainer process, always from the publisher's one service thread. The publisher refreshes
        the export before it gives the ticket away.

        Args:
            views: one-dimensional uint8 views of live storages, contiguous. Where the transport takes rows
                also two-dimensional ones, of contiguous rows that lie apart. Not copied: a later write by the
                trainer is what the next pull reads. The export keeps them alive.
        """

    def open(self, ticket: object, targets: Sequence[torch.Tensor], *, trainer_rank: int) -> Link:
        """Prepare to read an export.

        Called in the engine worker, always from one thread at a time.

        Args:
            ticket: from the :class:`Export` of the trainer rank.
            targets: uint8 views of landing memory, one for each view of the export, of the same shapes and of
                strides of their own. The link keeps them alive.
            trainer_rank: named in errors.

        Raises:
            TransportError: the sizes differ, or the source is gone.
        """
