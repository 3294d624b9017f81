"""The seam between the sync protocol and the machinery that moves bytes.

A trainer rank *exports* byte ranges of its live memory, once for each engine rank, and passes the ticket
through the coordinator. The engine rank *opens* the ticket onto its own landing memory, once, and then
*pulls* at every version: after a pull, the landing memory holds what the source memory holds now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Export(Protocol):
    """A trainer rank's side of one (trainer rank, engine rank) pair.

    Attributes:
        ticket: what the engine rank opens. Crosses processes inside Ray only, never over HTTP.
    """

    ticket: object

    def close(self) -> None:
        """Stop offering the memory. Idempotent. A later pull fails; it never brings other bytes."""


class Link(Protocol):
    """An engine rank's side of one pair."""

    def pull(self, *, timeout_s: float) -> None:
        """Read every byte of the export into the targets given at ``open``. Blocks without holding the GIL.

        After an error the targets may hold a mix of old and new bytes.

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
    """

    name: str

    def export(self, views: Sequence[torch.Tensor]) -> Export:
        """Offer live memory to one engine rank.

        Called in the trainer process, always from the publisher's one service thread.

        Args:
            views: contiguous one-dimensional uint8 views of live storages. Not copied: a later write by the
                trainer is what the next pull reads. The export keeps them alive.
        """

    def open(self, ticket: object, targets: Sequence[torch.Tensor], *, trainer_rank: int) -> Link:
        """Prepare to read an export.

        Called in the engine worker, always from one thread at a time.

        Args:
            ticket: from the :class:`Export` of the trainer rank.
            targets: contiguous one-dimensional uint8 views of landing memory, one for each view of the
                export, of the same sizes in bytes. The link keeps them alive.
            trainer_rank: named in errors.

        Raises:
            TransportError: the sizes differ, or the source is gone.
        """
