"""The group's last syncs, kept by its coordinator, so that tools in other processes can show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdt_core.client import CoordinatorClient
    from rdt_core.report import SyncFailure, SyncReport


class CoordinatorHistory:
    """A :class:`rdt_core.observer.SyncObserver` that hands each sync's outcome to the coordinator.

    It does not wait for the coordinator's answer: a sync that is done is done, recorded or not.
    """

    def __init__(self, client: CoordinatorClient) -> None:
        self._client = client

    def on_connected(self, group: str, engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Nothing to keep: the coordinator knows who is connected."""

    def on_synced(self, group: str, report: SyncReport) -> None:
        """Keep a completed sync, with its links."""
        self._client.start_record({"group": group, "outcome": "synced", **report.as_dict()})

    def on_failed(self, group: str, failure: SyncFailure) -> None:
        """Keep a failed sync."""
        self._client.start_record({"group": group, "outcome": "failed", **failure.as_dict()})

    def on_closed(self, group: str) -> None:
        """Nothing to keep: the engines leave by themselves."""
