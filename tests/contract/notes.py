"""An observer that writes down what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdt_core.report import SyncFailure, SyncReport


class Notes:
    """See :class:`rdt_core.observer.SyncObserver`."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def count(self, name: str) -> int:
        return sum(event == name for event, _ in self.events)

    def of(self, name: str) -> list[Any]:
        return [what for event, what in self.events if event == name]

    def on_connected(self, group: str, engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.events.append(("connected", (group, list(engines))))

    def on_synced(self, group: str, report: SyncReport) -> None:
        self.events.append(("synced", (group, report)))

    def on_failed(self, group: str, failure: SyncFailure) -> None:
        self.events.append(("failed", (group, failure)))

    def on_closed(self, group: str) -> None:
        self.events.append(("closed", group))
