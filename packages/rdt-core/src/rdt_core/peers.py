"""Engines that lend what they committed, on the coordinator's side: one more coordinator for each of them.

An engine that lends is to its readers what trainer ranks are to engines: ranks with manifests, a version, and
leases on it. So it needs no protocol of its own. Its readers and its ranks talk to a coordinator of theirs,
which lives in the group's and knows nothing of it; it is gone when nobody is in it.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from rdt_core.coordinator import Coordinator, reader_name
from rdt_core.errors import WireFormatError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdt_core.client import Channel

LENT_METHODS = frozenset(
    {
        "answer",
        "ask",
        "attach",
        "begin_read",
        "check_version",
        "detach",
        "drop_lease",
        "end_read",
        "end_tasks",
        "join",
        "leave",
        "manifests",
        "next_tasks",
        "publish",
        "release",
        "session",
        "topology",
    }
)
"""What an engine that lends and its readers may call."""

_LANDING = "landing:"
"""Before a rank's name: what it offers to its neighbours, which no newcomer reads."""


def landing_name(engine: str, rank: int) -> str:
    """As which an engine rank lends what it landed, see :mod:`rdt_core.relay`."""
    return f"{_LANDING}{reader_name(engine, rank)}"


class LenderCoordinator(Coordinator):
    """The coordinator of what one engine lends: its ranks are the trainer ranks of it."""

    @property
    def is_deserted(self) -> bool:
        """Whether no rank that lends is alive and no reader has joined."""
        return not self._has_live_ranks() and not self._engines


class GroupCoordinator(Coordinator):
    """The coordinator of a group, with those of the engines that lend. What the actor runs.

    Args:
        group: the group's name, for messages.
        clock: seconds, growing; every deadline is measured on it.
    """

    def __init__(self, group: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(group, clock)
        self._lending: dict[str, LenderCoordinator] = {}
        self._num_calls: Counter[str] = Counter()

    async def of_lender(self, engine: str, method: str, *args: Any) -> Any:
        """Call a method of the coordinator of what ``engine`` lends; it is made by its first caller.

        Raises:
            WireFormatError: there is no such method.
            RdtError: whatever the method raises.
        """
        if method not in LENT_METHODS:
            raise WireFormatError("lender's call", f"unknown method {method!r}")
        name = f"{self._group}, lent by {engine}"
        lender = self._lending.setdefault(engine, LenderCoordinator(name, self._clock))
        self._num_calls[engine] += 1
        try:
            return await getattr(lender, method)(*args)
        finally:
            self._num_calls[engine] -= 1
            if not self._num_calls[engine] and lender.is_deserted:
                del self._lending[engine], self._num_calls[engine]

    async def status(self) -> dict[str, Any]:
        """What :meth:`Coordinator.status` says, and which engines lend now."""
        return {**await super().status(), "lending": self._lenders()}

    def _lenders(self) -> list[str]:
        lending = (engine for engine, lender in self._lending.items() if not lender.is_deserted)
        return sorted(engine for engine in lending if not engine.startswith(_LANDING))


class LenderChannel:
    """A :class:`rdt_core.client.Channel` to the coordinator of what one engine lends.

    Args:
        channel: to the group's coordinator.
        engine: that lends.
    """

    def __init__(self, channel: Channel, engine: str) -> None:
        self._channel, self._engine = channel, engine

    def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """See :class:`rdt_core.client.Channel`."""
        return self._channel.call("of_lender", self._engine, method, *args, timeout_s=timeout_s)

    def start(self, method: str, *args: object) -> Callable[[float], Any]:
        """See :class:`rdt_core.client.Channel`."""
        return self._channel.start("of_lender", self._engine, method, *args)

    def end(self) -> None:
        """Nothing: a coordinator that nobody is in is gone."""
