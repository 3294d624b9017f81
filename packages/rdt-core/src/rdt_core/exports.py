"""What a trainer rank offers to engine ranks: one export a reader, and the scratch buffer of its probe."""

from __future__ import annotations

import contextlib
import itertools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rdt_core.arena import ARENA_WINDOW
from rdt_core.arena_memory import Arenas
from rdt_core.digest import digest_bytes
from rdt_core.errors import TransportError
from rdt_core.export_request import parse_export, parse_probe, parse_reader
from rdt_core.probe import ROUNDS, ProbeSource, ScratchPool
from rdt_core.row_views import view_rows
from rdt_core.transports import make_transport
from rdt_core.transports.pieces import split

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rdt_core.arena_memory import ArenaHold
    from rdt_core.transports.base import Export, Transport


@dataclass(frozen=True, slots=True)
class _Offer:
    """What one reader reads: exports of these views, and the arena that some of them lie in."""

    exports: Sequence[Export]
    views: Sequence[torch.Tensor]
    arena: ArenaHold
    is_live: bool

    def close(self) -> None:
        """Stop offering, then free."""
        for export in self.exports:
            export.close()
        self.arena.close()


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
        self._arenas = Arenas(windows)
        self._offers: dict[str, _Offer] = {}
        self._probes: dict[str, ProbeSource] = {}
        self._scratch = ScratchPool()
        self._held: dict[tuple[str, str], Export] = {}
        # Held while exports are refreshed: by publish, and by the service thread for a new one, so that an
        # export that comes while a version is published does not miss it.
        self._refreshing = threading.Lock()

    @property
    def arena_bytes(self) -> int:
        """Memory held beside the windows for readers that need them packed or narrowed."""
        return self._arenas.nbytes

    def refresh(self, version: int) -> None:
        """Let every export hold ``version``. Called by ``publish``, in the trainer's thread.

        Nobody may be reading an older version where there are arenas.

        Raises:
            TransportError: a snapshot transport could not take the bytes.
        """
        with self._refreshing:
            self._arenas.refresh()
            copied = (offer.exports for offer in self._offers.values() if not offer.is_live)
            for export in itertools.chain(self._live_holds(), *copied):
                export.refresh(version)
            self._version = version

    def probe(self, payload: Mapping[str, Any]) -> object:
        """Write one round of a reader's probe and return the ticket of its scratch buffer."""
        asked = parse_probe(payload)
        reader, name = asked.reader, asked.transport
        if asked.version == ROUNDS[0]:
            # The reader may have died in an earlier probe and be back.
            self.drop(payload)
        source = self._probes.get(reader)
        if source is None:
            scratch = self._scratch.take(self._transport(name), torch.device(self._device))
            source = self._probes[reader] = ProbeSource(self._transport(name), scratch)
        return source.write(asked.secret, asked.version)

    def open(self, payload: Mapping[str, Any]) -> list[object]:
        """Offer byte ranges to a reader, in place of all that it had before; returns a ticket a piece.

        Raises:
            WireFormatError: the request is malformed.
            ArenaMemoryError: there is no memory for what the reader wants laid out.
            TransportError: the transport does not take rows, and some are asked for.
        """
        asked = parse_export(payload, {name: flat.numel() for name, flat in self._windows.items()})
        name = asked.transport
        if any(rows.num_rows > 1 for _, rows in asked.ranges) and not self._transport(name).takes_rows:
            raise TransportError(
                f"{name} reads contiguous ranges only, and {asked.reader} asks for rows. Both sides must run "
                "the same rdt-core version."
            )
        self.drop(payload)
        self._hold_windows(name, {window for window, _ in asked.ranges} - {ARENA_WINDOW})
        with contextlib.ExitStack() as undo:
            arena = self._arenas.hold(asked.items)
            undo.callback(arena.close)
            views = [
                view_rows(arena.view(rows.offset, rows.end - rows.offset), rows._replace(offset=0))
                if window == ARENA_WINDOW
                else view_rows(self._windows[window], rows)
                for window, rows in asked.ranges
            ]
            exports = []
            for part in split(views, asked.pieces):
                exports.append(self._transport(name).export(part))
                undo.callback(exports[-1].close)
            with self._refreshing:
                for export in exports:
                    export.refresh(self._version)
                self._offers[asked.reader] = _Offer(exports, views, arena, self._transport(name).is_live)
            undo.pop_all()
        return [export.ticket for export in exports]

    def digest(self, payload: Mapping[str, Any]) -> list[int]:
        """Digests of the byte ranges that a reader reads, one each."""
        offer = self._offers.get(parse_reader(payload))
        return [digest_bytes(view) for view in offer.views] if offer is not None else []

    def drop(self, payload: Mapping[str, Any]) -> None:
        """Drop what a reader had. A reader that had nothing is no error."""
        reader = parse_reader(payload)
        probe = self._probes.pop(reader, None)
        if probe is not None:
            probe.close()
            self._scratch.give(probe.scratch)
        with self._refreshing:
            offer = self._offers.pop(reader, None)
        if offer is not None:
            offer.close()

    def close(self) -> None:
        """Drop everything. Called once the service thread has ended. Idempotent."""
        for reader in [*self._offers, *self._probes]:
            self.drop({"reader": reader})
        for hold in set(self._held.values()):
            hold.close()
        self._held.clear()
        self._scratch.close()

    def _hold_windows(self, transport: str, windows: Iterable[str]) -> None:
        """Export windows once more, to nobody, so that they stay registered when their readers leave.

        With the windows and the probes' scratch buffers held, an engine that comes or goes costs the others
        nothing; see :class:`rdt_core.probe.ScratchPool`.
        """
        new = sorted(window for window in windows if (transport, window) not in self._held)
        if new:
            hold = self._transport(transport).export([self._windows[window] for window in new])
            with self._refreshing:
                self._held.update(dict.fromkeys(((transport, window) for window in new), hold))

    def _live_holds(self) -> set[Export]:
        """What holds the windows that readers map."""
        held = self._held.items()
        return {hold for (transport, _), hold in held if self._transport(transport).is_live}

    def _transport(self, name: str) -> Transport:
        if name not in self._transports:
            self._transports[name] = make_transport(name)
        return self._transports[name]
