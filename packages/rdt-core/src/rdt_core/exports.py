"""What a trainer rank offers to engine ranks: one export a reader, and the scratch buffer of its probe."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from rdt_core.digest import digest_bytes
from rdt_core.probe import ProbeSource
from rdt_core.transports import make_transport

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from rdt_core.transports.base import Export, Transport


class Exports:
    """All exports of one trainer rank. Requests come from the publisher's service thread, one at a time.

    Args:
        windows: flat uint8 views of the live memory, by window name.
        device: where that memory is.
        version: the last one that this rank published, 0 before the first.
    """

    def __init__(self, windows: Mapping[str, torch.Tensor], device: str, version: int) -> None:
        self._windows, self._device, self._version = windows, device, version
        self._transports: dict[str, Transport] = {}
        self._exports: dict[str, Export] = {}
        self._views: dict[str, list[torch.Tensor]] = {}
        self._probes: dict[str, ProbeSource] = {}
        # Held while exports are refreshed: by publish, and by the service thread for a new one, so that an
        # export that comes while a version is published does not miss it.
        self._refreshing = threading.Lock()

    def refresh(self, version: int) -> None:
        """Let every export hold ``version``. Called by ``publish``, in the trainer's thread.

        Raises:
            TransportError: a snapshot transport could not take the bytes.
        """
        with self._refreshing:
            for export in self._exports.values():
                export.refresh(version)
            self._version = version

    def probe(self, payload: Mapping[str, Any]) -> object:
        """Write one round of a reader's probe and return the ticket of its scratch buffer."""
        reader = str(payload["reader"])
        source = self._probes.get(reader)
        if source is None:
            source = ProbeSource(self._transport(str(payload["transport"])), self._device)
            self._probes[reader] = source
        return source.write(str(payload["secret"]), int(payload["version"]))

    def open(self, payload: Mapping[str, Any]) -> object:
        """Offer byte ranges to a reader, in place of all that it had before; returns the ticket."""
        reader = str(payload["reader"])
        self.drop(payload)
        views = [
            self._windows[window][offset : offset + nbytes] for window, offset, nbytes in payload["ranges"]
        ]
        export = self._transport(str(payload["transport"])).export(views)
        with self._refreshing:
            try:
                export.refresh(self._version)
            except BaseException:
                export.close()
                raise
            self._exports[reader], self._views[reader] = export, views
        return export.ticket

    def digest(self, payload: Mapping[str, Any]) -> list[int]:
        """Digests of the byte ranges that a reader reads, one each."""
        return [digest_bytes(view) for view in self._views.get(str(payload["reader"]), ())]

    def drop(self, payload: Mapping[str, Any]) -> None:
        """Drop what a reader had. A reader that had nothing is no error."""
        reader = str(payload["reader"])
        probe = self._probes.pop(reader, None)
        if probe is not None:
            probe.close()
        with self._refreshing:
            export = self._exports.pop(reader, None)
        self._views.pop(reader, None)
        if export is not None:
            export.close()

    def close(self) -> None:
        """Drop everything. Called once the service thread has ended. Idempotent."""
        for reader in [*self._exports, *self._probes]:
            self.drop({"reader": reader})

    def _transport(self, name: str) -> Transport:
        if name not in self._transports:
            self._transports[name] = make_transport(name)
        return self._transports[name]
