"""openYuanrong's data system: a snapshot store, put into at every publish. For Ascend, and run on CPU.

A data worker on each node (``dscli start``) keeps objects in shared memory and fetches those of other nodes.
An export puts the bytes of each version under keys of that version; a link gets them by the same keys.

Facts that shape this file (openyuanrong-datasystem 0.8.1): a key that is put again is NOT fetched again by a
node that has read it, which goes on getting the old bytes, so no key is ever put twice; every call of the
client holds the GIL until it returns, so objects are small; keys may hold letters, digits and a few signs,
but no slash; an object of no bytes is refused.

Why not ray-ascend's Ray transport: docs/decisions/0010-openyuanrong-without-ray-ascend.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rdt_core import settings
from rdt_core.errors import (
    PullTimeoutError,
    SourceDiedError,
    TransportError,
    TransportUnavailableError,
)
from rdt_core.transports.pieces import cut_into_objects, object_nbytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rdt_core.transports.pieces import Piece

logger = logging.getLogger(__name__)

OBJECT_NBYTES = 16 * 2**20
"""Size of an object. A fetch from another node holds the GIL for as long as one takes: some 35 ms."""

REQUEST_TIMEOUT_MS = 5000
"""For one call to the data worker. It holds the GIL, so a worker that is stopped stands its process still."""

LIFETIME_S = 24 * 3600
"""After which the worker drops a version by itself: what a trainer that was killed leaves behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YrTicket:
    """Where an export keeps its versions.

    Args:
        prefix: of every key of the export.
        sizes: of the views, in bytes.
        max_object_nbytes: at which they are cut.
    """

    prefix: str
    sizes: tuple[int, ...]
    max_object_nbytes: int

    def keys(self, version: int) -> list[str]:
        """One key an object of a version."""
        num_objects = -(-sum(self.sizes) // self.max_object_nbytes)
        return [f"{self.prefix}:{version}:{index}" for index in range(num_objects)]

    def objects(self) -> list[list[Piece]]:
        """What each object holds."""
        return cut_into_objects(self.sizes, self.max_object_nbytes)


class YrExport:
    """See :class:`rdt_core.transports.base.Export`. Keeps one version in the store."""

    def __init__(self, client: Any, views: Sequence[torch.Tensor], max_object_nbytes: int) -> None:
        self._client, self._views = client, tuple(views)
        self._ticket = YrTicket(
            prefix=f"rdt:{uuid.uuid4().hex}",
            sizes=tuple(view.numel() for view in views),
            max_object_nbytes=max_object_nbytes,
        )
        self.ticket: object = self._ticket
        self._objects = self._ticket.objects()
        self._stored: list[str] = []

    def refresh(self, version: int) -> None:
        """Replace the version in the store by this one; copies every byte once, device to host if need be.

        The old version goes first, so that the store never holds two: a reader that is still at it gets an
        error, and its version is being replaced anyway.

        Raises:
            TransportError: the store has no room, or its worker does not answer.
        """
        self._drop_stored()
        for key, pieces in zip(self._ticket.keys(version), self._objects, strict=True):
            self._stored.append(key)
            try:
                self._put(key, pieces)
            except RuntimeError as error:
                self._drop_stored()
                raise TransportError(
                    f"the data worker did not take version {version}, {sum(self._ticket.sizes)} bytes: "
                    f"{_first_line(error)}. Look whether it runs, and give it room for every reader's part: "
                    "dscli start ... --shared_memory_size_mb."
                ) from error

    def _put(self, key: str, pieces: Sequence[Piece]) -> None:
        (buffer,) = self._client.mcreate([key], [object_nbytes(pieces)], ttl_second=LIFETIME_S)
        memory = torch.frombuffer(buffer.MutableData(), dtype=torch.uint8)
        for piece in pieces:
            view = self._views[piece.view]
            memory[piece.object_offset : piece.object_offset + piece.nbytes].copy_(
                view[piece.view_offset : piece.view_offset + piece.nbytes]
            )
        self._client.mset_buffer([buffer])

    def _drop_stored(self) -> None:
        stored, self._stored = self._stored, []
        if not stored:
            return
        try:
            self._client.delete(stored)
        except RuntimeError as error:
            logger.debug("the data worker did not drop %d objects: %s", len(stored), _first_line(error))

    def close(self) -> None:
        """Drop the stored version and let the memory go."""
        self._drop_stored()
        self._views = ()
        self._objects = []


class YrLink:
    """See :class:`rdt_core.transports.base.Link`."""

    def __init__(
        self, client: Any, ticket: YrTicket, targets: Sequence[torch.Tensor], trainer_rank: int
    ) -> None:
        self._client: Any | None = client
        self._ticket, self._targets, self._trainer_rank = ticket, tuple(targets), trainer_rank
        self._objects = ticket.objects()

    def pull(self, version: int, *, timeout_s: float) -> None:
        """Get every object of the version and copy it to the targets.

        The client holds the GIL while it gets an object, the copies do not. May overrun ``timeout_s`` by the
        client's own time-out of one call.
        """
        if self._client is None:
            raise TransportError("this link has been closed. Open the ticket again.")
        deadline = time.monotonic() + timeout_s
        for key, pieces in zip(self._ticket.keys(version), self._objects, strict=True):
            if time.monotonic() > deadline:
                raise PullTimeoutError(self._trainer_rank, timeout_s)
            self._get(self._client, key, version, pieces)

    def _get(self, client: Any, key: str, version: int, pieces: Sequence[Piece]) -> None:
        try:
            (buffer,) = client.get_read_only_buffers([key])
            data = None if buffer is None else buffer.immutable_data()
        except RuntimeError as error:
            if "[Key not found]" in str(error):
                data = None
            else:
                raise TransportError(
                    f"the data worker did not bring version {version} of trainer rank {self._trainer_rank}: "
                    f"{_first_line(error)}. Look whether it runs on this node and on the trainer's."
                ) from error
        if data is None or data.nbytes != object_nbytes(pieces):
            raise SourceDiedError(self._trainer_rank, f"its version {version} is not in the store")
        memory = _as_tensor(data)
        for piece in pieces:
            target = self._targets[piece.view]
            target[piece.view_offset : piece.view_offset + piece.nbytes].copy_(
                memory[piece.object_offset : piece.object_offset + piece.nbytes]
            )

    def close(self) -> None:
        """Forget the source and let the targets go."""
        self._client = None
        self._targets = ()


class YrTransport:
    """See :class:`rdt_core.transports.base.Transport`. A snapshot outlives its trainer until ``LIFETIME_S``.

    Args:
        max_object_nbytes: size of an object in the store; tests take a small one.

    Raises:
        TransportUnavailableError: the data system's client is not installed, or no worker answers.
    """

    name = "yr"
    takes_rows = False
    is_live = False

    def __init__(self, max_object_nbytes: int = OBJECT_NBYTES) -> None:
        self._max_object_nbytes = max_object_nbytes
        self._client = _connect()

    def register(self, views: Sequence[torch.Tensor]) -> contextlib.ExitStack:
        """Nothing is registered."""
        del views
        return contextlib.ExitStack()

    def export(self, views: Sequence[torch.Tensor]) -> YrExport:
        """Prepare to put the views; the first refresh does."""
        return YrExport(self._client, views, self._max_object_nbytes)

    def open(self, ticket: object, targets: Sequence[torch.Tensor], *, trainer_rank: int) -> YrLink:
        """Prepare to get an export's versions."""
        if not isinstance(ticket, YrTicket):
            raise TransportError(f"{ticket!r} is not a ticket of the yr transport.")
        sizes = tuple(target.numel() for target in targets)
        if sizes != ticket.sizes:
            raise TransportError(
                f"targets of {len(sizes)} ranges, {sum(sizes)} bytes, cannot take an export of "
                f"{len(ticket.sizes)} ranges, {sum(ticket.sizes)} bytes. Both sides must replay one plan."
            )
        return YrLink(self._client, ticket, targets, trainer_rank)


def _connect() -> Any:
    """The client of this node's data worker, one a process."""
    address = settings.read_data_worker()
    if address is None:
        raise TransportUnavailableError(
            "yr",
            "DATASYSTEM_HOST and DATASYSTEM_PORT are not set",
            "Start a data worker on every node (dscli start) and set both to the address of this node's.",
        )
    return _connect_to(*address)


@functools.cache
def _connect_to(host: str, port: int) -> Any:
    try:
        kv_client = importlib.import_module("yr.datasystem.kv_client")
    except ImportError as error:
        raise TransportUnavailableError(
            "yr", f"yr.datasystem cannot be imported ({error})", "Install it with `pip install rdt-core[yr]`."
        ) from error
    client = kv_client.KVClient(
        host=host,
        port=port,
        connect_timeout_ms=REQUEST_TIMEOUT_MS,
        req_timeout_ms=REQUEST_TIMEOUT_MS,
    )
    try:
        client.init()
    except RuntimeError as error:
        raise TransportUnavailableError(
            "yr",
            f"no data worker answers at {host}:{port} ({_first_line(error)})",
            "Start one with dscli start, or correct DATASYSTEM_HOST and DATASYSTEM_PORT.",
        ) from error
    return client


def _as_tensor(data: memoryview) -> torch.Tensor:
    """A tensor over read-only memory, only to read. By address, since torch warns of such memory otherwise.

    The memory stays while the caller holds ``data``.
    """
    address = np.frombuffer(data, dtype=np.uint8).ctypes.data
    return torch.frombuffer((ctypes.c_uint8 * data.nbytes).from_address(address), dtype=torch.uint8)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
