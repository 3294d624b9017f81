"""One engine as the driver of a group sees it: how to reach it, its ranks, and the version it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from rdt_core.errors import NotConnectedError
from rdt_core.fan_out import Neighbour, Place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


MARGIN_S = 5.0
"""What an engine gets on top of its own deadline, so that its error is the one that reaches the user."""

CONNECT_MARGIN_S = 15.0
"""The same for a connect, whose engine in turn waits for trainers and a coordinator."""


class EngineControl(Protocol):
    """How a driver reaches one engine. :class:`rdt_core.engine_http.EngineHttp` is the real one.

    Attributes:
        url: the engine's identity in its group.
    """

    url: str

    def call(self, method: str, payload: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Run a control method on every rank; blocks, at most ``timeout_s`` seconds.

        Raises:
            RdtError: the typed error of the first rank that failed; its ``failed_rank`` says which.
            EngineError: the engine does not answer, or with something else.
        """

    def announce(self, method: str, payload: Mapping[str, Any]) -> None:
        """Say that :meth:`call` comes soon, with as long a payload, so that it takes less. Never raises."""

    def retract(self, method: str) -> None:
        """Say that it does not come after all. Idempotent, never raises."""

    def is_listening(self) -> bool:
        """Whether something still accepts connections there. Blocks for 2 seconds at most."""

    def close(self) -> None:
        """Let go of connections. Idempotent."""


class Member:
    """An engine of a group.

    Args:
        engine: how to reach it.
    """

    def __init__(self, engine: EngineControl) -> None:
        self._engine = engine
        self.ranks: list[dict[str, Any]] = []
        self.version = 0
        self._was_asked_to_connect = False

    @property
    def url(self) -> str:
        """The engine's identity."""
        return self._engine.url

    @property
    def rank_ids(self) -> list[tuple[str, int]]:
        """Every rank as the coordinator names it."""
        return [(self.url, int(rank["rank"])) for rank in self.ranks]

    @property
    def is_connected(self) -> bool:
        """Whether the engine has joined, as far as this driver knows."""
        return bool(self.ranks)

    @property
    def may_be_connected(self) -> bool:
        """Whether the engine has joined, or may yet, having been asked by a call that this driver gave up."""
        return self._was_asked_to_connect

    def connect(self, asked: Mapping[str, Any], timeout_s: float) -> None:
        """Have every rank join the group; replaces an earlier connection, also when it fails."""
        self._was_asked_to_connect = True
        self.ranks = []
        answer = self.call("connect", {**asked, "engine": self.url}, timeout_s + CONNECT_MARGIN_S)
        self.ranks = answer["ranks"]
        # The whole engine holds a version when all of its ranks do.
        self.version = min(int(rank.get("version", 0)) for rank in self.ranks)

    @property
    def awaits_publication(self) -> bool:
        """Whether every rank can be asked to read a version that is yet to be published."""
        return self.is_connected and all(rank.get("awaits_publication") is True for rank in self.ranks)

    @property
    def places(self) -> list[Place]:
        """The landing memory of every rank."""
        return [
            Place(
                Neighbour(self.url, int(rank["rank"])),
                str(rank.get("landing_key", "")),
                str(rank.get("landing_device", "")),
            )
            for rank in self.ranks
        ]

    def learn(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Take over what a commit answered: a rank that planned anew since its connect lands otherwise."""
        landings = {rank.get("rank"): rank.get("landing_key", "") for rank in ranks}
        for rank in self.ranks:
            rank["landing_key"] = landings.get(rank["rank"], "")

    def reads_in(self, mode: str) -> bool:
        """Whether the engine has joined, and every rank is connected in this mode."""
        return self.is_connected and all(rank["mode"] == mode for rank in self.ranks)

    def call(self, method: str, payload: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """See :meth:`EngineControl.call`. An engine that says it has not joined is believed."""
        try:
            return self._engine.call(method, payload, timeout_s=timeout_s)
        except NotConnectedError:
            self.ranks = []
            raise

    def announce(self, method: str, payload: Mapping[str, Any]) -> None:
        """See :meth:`EngineControl.announce`."""
        self._engine.announce(method, payload)

    def retract(self, method: str) -> None:
        """See :meth:`EngineControl.retract`."""
        self._engine.retract(method)

    def is_listening(self) -> bool:
        """See :meth:`EngineControl.is_listening`."""
        return self._engine.is_listening()

    def close(self) -> None:
        """Let go of the engine without a word to it. Idempotent."""
        self._engine.close()
