"""Who is told about syncs: metrics, histories, status pages. One hook in ``WeightSync`` serves all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rdt_core.report import SyncFailure, SyncReport

logger = logging.getLogger(__name__)


class SyncObserver(Protocol):
    """Told what a driver does, in the driver's thread. Must return at once and must not raise."""

    def on_connected(self, group: str, engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Every engine has joined. ``engines``: what each rank answered to connect, by engine."""

    def on_synced(self, group: str, report: SyncReport) -> None:
        """Every engine of the group serves ``report.version``."""

    def on_failed(self, group: str, failure: SyncFailure) -> None:
        """A sync ended without a commit."""

    def on_closed(self, group: str) -> None:
        """The driver has left the group; its engines are no longer connected."""


def tell(observers: Sequence[SyncObserver], event: Callable[[SyncObserver], None]) -> None:
    """Pass one event to every observer. One that raises is logged: it must not undo a sync that is done."""
    for observer in observers:
        try:
            event(observer)
        except Exception:
            logger.exception("%s failed as an observer of weight syncs", type(observer).__name__)
