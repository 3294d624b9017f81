"""The memory transport behind a gate: a test can stop a pull in its middle, and have it fail there."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdt_core.transports.memory import MemoryLink, MemoryTransport

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Sequence

    import torch

    from rdt_core.transports.memory import MemoryExport

DEADLINE_S = 60.0
NAME = "gated"


@dataclass
class Gate:
    """What every pull of this process does between its first and its second half.

    A pull that reaches a closed gate says so and waits for it to open; then it fails if it was told to.
    """

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None
    on_reach: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        self.opened.set()

    def close(self) -> None:
        """Have the next pull stop in its middle."""
        self.reached.clear()
        self.opened.clear()

    def wait_until_reached(self) -> None:
        """Until a pull stands in its middle."""
        assert self.reached.wait(DEADLINE_S), "no pull reached the gate"

    def pass_through(self) -> None:
        """Called by a pull in its middle."""
        self.reached.set()
        if self.on_reach is not None:
            self.on_reach()
        assert self.opened.wait(DEADLINE_S), "the gate stayed closed"
        if self.failure is not None:
            raise self.failure


gate = Gate()


def reset() -> None:
    """A new gate, open and without a failure; pulls that wait at the old one go on."""
    global gate  # noqa: PLW0603  transports are made by name, so a test has no other way to reach this one
    gate.opened.set()
    gate = Gate()


class GatedLink:
    """See :class:`rdt_core.transports.base.Link`."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link

    def pull(self, version: int, *, timeout_s: float) -> None:
        del version, timeout_s
        pairs = list(zip(self._link._targets, self._link._source(), strict=True))
        middle = (len(pairs) + 1) // 2
        for target, view in pairs[:middle]:
            target.copy_(view)
        gate.pass_through()
        for target, view in pairs[middle:]:
            target.copy_(view)

    def close(self) -> None:
        self._link.close()


class GatedTransport:
    """See :class:`rdt_core.transports.base.Transport`."""

    name = NAME
    takes_rows = True
    is_live = True

    def __init__(self) -> None:
        self._memory = MemoryTransport()

    def register(self, views: Sequence[torch.Tensor]) -> contextlib.ExitStack:
        return self._memory.register(views)

    def export(self, views: Sequence[torch.Tensor]) -> MemoryExport:
        return self._memory.export(views)

    def open(self, ticket: object, targets: Sequence[torch.Tensor], *, trainer_rank: int) -> GatedLink:
        return GatedLink(self._memory.open(ticket, targets, trainer_rank=trainer_rank))
