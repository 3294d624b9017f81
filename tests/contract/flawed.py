"""Transports that do over real memory what broken adapters do, for tests of what must notice them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rdt_core.errors import TransportError
from rdt_core.transports.memory import MemoryLink, MemoryTicket, MemoryTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    Views = Sequence[torch.Tensor]
    Flaw = Callable[[Views, Views, Views], None]


class FlawedLink(MemoryLink):
    """A link that ends its pull with one flaw: a function of targets, targets before, and first version."""

    def __init__(self, number: int, targets: Views, trainer_rank: int, flaw: Flaw) -> None:
        super().__init__(number, targets, trainer_rank)
        self._flaw = flaw
        self._first: list[torch.Tensor] = []

    def pull(self, version: int, *, timeout_s: float) -> None:
        self._first = self._first or [view.clone() for view in self._source()]
        before = [target.clone() for target in self._targets]
        super().pull(version, timeout_s=timeout_s)
        self._flaw(self._targets, before, self._first)


class FlawedTransport(MemoryTransport):
    """The memory transport with one flaw."""

    def __init__(self, flaw: Flaw) -> None:
        self._flaw = flaw

    def open(self, ticket: object, targets: Views, *, trainer_rank: int) -> MemoryLink:
        assert isinstance(ticket, MemoryTicket)
        return FlawedLink(ticket.number, targets, trainer_rank, self._flaw)


def leave_untouched(targets: Views, before: Views, first: Views) -> None:
    """As ray-ascend 0.1.1 does: it rebinds the items of a copied list."""
    del first
    for target, old in zip(targets, before, strict=True):
        target.copy_(old)


def bring_stale(targets: Views, before: Views, first: Views) -> None:
    """As a store does whose key is put again: the reader's node has a cached copy of the first version."""
    del before
    for target, old in zip(targets, first, strict=True):
        target.copy_(old)


def flip_one_byte(targets: Views, before: Views, first: Views) -> None:
    """As a read does that is not synchronized with its end."""
    del before, first
    targets[1][4000] += 1


def skip_the_last_view(targets: Views, before: Views, first: Views) -> None:
    """As a loop does that ends one too early."""
    del first
    targets[-1].copy_(before[-1])


def write_beside(targets: Views, before: Views, first: Views) -> None:
    """As a copy does that rounds up."""
    del before, first
    last = targets[-1]
    last.as_strided((1,), (1,), int(last.storage_offset()) + last.numel())[0] = 1


class LiesLikeRayAscend(FlawedTransport):
    """For :func:`rdt_core.transports.make_transport`, which passes no arguments."""

    def __init__(self) -> None:
        super().__init__(leave_untouched)


class RefusesRankOne(MemoryTransport):
    """Its second link to trainer rank 1, the one that follows the probe's, cannot be opened."""

    opened: ClassVar[list[MemoryLink]] = []

    def __init__(self) -> None:
        self._num_asked = 0

    def open(self, ticket: object, targets: Views, *, trainer_rank: int) -> MemoryLink:
        self._num_asked += trainer_rank == 1
        if self._num_asked > 1:
            raise TransportError("trainer rank 1 cannot be read.")
        self.opened.append(super().open(ticket, targets, trainer_rank=trainer_rank))
        return self.opened[-1]
