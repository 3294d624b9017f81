"""CUDA IPC: two processes of one host, on one GPU or on peers; the reader's GPU copies, nobody else acts.

The trainer rank hands out handles of the allocations that hold its live memory, as plain bytes. The engine
rank maps them once and from then on copies with one kernel launch a version, regions of any stride
included, without Ray, without the trainer's process and without memory of the trainer's for packing.

A handle knows nothing of ``CUDA_VISIBLE_DEVICES``: it names its device itself, and the reader maps it for
the device of its targets. What such a mapping cannot tell, whether its owner is still there, the lifeline
tells before and after every pull.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import torch

from rdt_core.errors import (
    PullTimeoutError,
    SourceDiedError,
    TransportError,
    TransportUnavailableError,
)
from rdt_core.row_blocks import RowBlock, Rows
from rdt_core.transports import cuda_driver
from rdt_core.transports.cuda_driver import CudaDriverError
from rdt_core.transports.fused_copy import FusedCopy
from rdt_core.transports.host_signal import HostSignal
from rdt_core.transports.lifeline import Anchor, Lifeline, LifelineBrokenError

if TYPE_CHECKING:
    from collections.abc import Sequence

_TICKET_FORMAT = 2
_CHECK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaIpcTicket:
    """What a trainer rank tells one engine rank; crosses as msgpack.

    Args:
        host: of the trainer rank; handles mean nothing on another.
        device: UUID of its GPU.
        anchor: name of the export's end of the lifeline.
        handles: one an allocation.
        ranges: (index of the handle, then the fields of :class:`rdt_core.row_blocks.Rows` in its allocation),
            one a view, as flat int64.
    """

    host: str
    device: str
    anchor: str
    handles: tuple[bytes, ...]
    ranges: bytes

    def as_bytes(self) -> bytes:
        """For :meth:`parse`."""
        packed: bytes = msgpack.packb({"cuda_ipc": _TICKET_FORMAT, **asdict(self)})
        return packed

    @classmethod
    def parse(cls, raw: object) -> CudaIpcTicket:
        """The ticket in a message.

        Raises:
            TransportError: it holds none.
        """
        try:
            fields: dict[str, Any] = {**msgpack.unpackb(raw)}
            is_known = fields.pop("cuda_ipc") == _TICKET_FORMAT
            ticket = cls(**{**fields, "handles": tuple(fields["handles"])}) if is_known else None
            if ticket is not None:
                ticket.rows()
        except (TypeError, ValueError, KeyError, AttributeError, msgpack.UnpackException) as error:
            reason = f"not a ticket of the cuda_ipc transport ({type(error).__name__}: {error})"
            raise TransportError(f"{reason}. Check that both sides run the same rdt-core version.") from error
        if ticket is None:
            raise TransportError(
                "not a ticket of this cuda_ipc transport. Both sides must run one rdt-core version."
            )
        return ticket

    def rows(self) -> list[tuple[int, Rows]]:
        """The ranges, each the index of its handle and its place in that allocation."""
        flat = array("q", self.ranges)
        fields = [flat[at :: 1 + len(Rows._fields)] for at in range(1 + len(Rows._fields))]
        return [(index, Rows(*place)) for index, *place in zip(*fields, strict=True)]


class CudaIpcExport:
    """See :class:`rdt_core.transports.base.Export`. Keeps the storages, so that no allocation is freed."""

    def __init__(self, views: Sequence[torch.Tensor], device: torch.device) -> None:
        self._views = tuple(views)
        self._storages = {view.untyped_storage().data_ptr(): view.untyped_storage() for view in views}
        with torch.cuda.device(device):
            # Whatever was written before a reader came is there; later writes are publish's to wait for.
            torch.cuda.synchronize()
            handles, rows = _share(self._views)
        self._anchor = Anchor()
        self.ticket: object = CudaIpcTicket(
            host=host_identity(),
            device=device_identity(device),
            anchor=self._anchor.name,
            handles=tuple(handles),
            ranges=array("q", [value for index, place in rows for value in (index, *place)]).tobytes(),
        ).as_bytes()

    def refresh(self, version: int) -> None:
        """Nothing to copy; refuses memory that was freed while it was exported, which readers still map."""
        # A storage that is resized lies elsewhere, or nowhere. A publish asks for thousands: no more is done.
        addresses, found = [*self._storages], [*map(torch.UntypedStorage.data_ptr, self._storages.values())]
        if addresses != found:
            num_moved = sum(map(operator.ne, addresses, found))
            raise TransportError(
                f"{num_moved} of {len(addresses)} storages that engines read by CUDA IPC were freed or "
                f"resized before version {version}. Keep parameters where they were at attach, or attach "
                "again."
            )

    def close(self) -> None:
        """Break the reader's lifeline and let the memory go."""
        self._anchor.close()
        self._views, self._storages = (), {}


class CudaIpcLink:
    """See :class:`rdt_core.transports.base.Link`."""

    def __init__(
        self, ticket: CudaIpcTicket, targets: Sequence[torch.Tensor], device: torch.device, trainer_rank: int
    ) -> None:
        self._targets, self._device, self._trainer_rank = tuple(targets), device, trainer_rank
        self._mapped: list[int] = []
        self._copy: FusedCopy | None = None
        try:
            self._lifeline = Lifeline(ticket.anchor)
        except LifelineBrokenError as error:
            raise SourceDiedError(trainer_rank, f"its export does not answer: {error}") from error
        try:
            with torch.cuda.device(device):
                self._map(ticket)
                self._signal = HostSignal()
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
                torch.cuda.synchronize()
        except (CudaDriverError, OSError) as error:
            self.close()
            raise TransportError(
                f"the memory of trainer rank {trainer_rank} cannot be mapped: {error}. Its GPU is "
                f"{ticket.device}, this one {device_identity(device)}; without peer access between them "
                "(nvidia-smi topo -p2p r), or across MIG instances, use transport='nixl'."
            ) from error

    def _map(self, ticket: CudaIpcTicket) -> None:
        for handle in ticket.handles:
            self._mapped.append(cuda_driver.map_allocation(handle))
        blocks = [
            RowBlock(
                self._mapped[index] + rows.offset,
                target.data_ptr(),
                rows.row_nbytes,
                rows.num_rows,
                rows.pitch,
                target.stride(0) if rows.num_rows > 1 else 0,
            )
            for (index, rows), target in zip(ticket.rows(), self._targets, strict=True)
            if rows.nbytes
        ]
        self._copy = FusedCopy(blocks, self._device)

    def pull(self, version: int, *, timeout_s: float) -> None:
        """Copy the export into the targets; sleeps in one C call until the GPU has done it."""
        del version
        if self._copy is None:
            raise TransportError("this link has been closed. Open the ticket again.")
        self._check_source()
        try:
            with torch.cuda.device(self._device):
                self._copy.launch(self._stream)
                cuda_driver.call_host(self._stream, self._signal.post_address, self._signal.argument)
                self._await_copy(timeout_s)
        except CudaDriverError as error:
            raise TransportError(f"reading trainer rank {self._trainer_rank} failed: {error}.") from error
        self._check_source()

    def _await_copy(self, timeout_s: float) -> None:
        left_s = timeout_s
        while not self._signal.wait(min(left_s, _CHECK_EVERY_S)):
            left_s -= _CHECK_EVERY_S
            if left_s <= 0:
                # The kernel may still write into the targets, and its signal still come: give up both.
                _abandoned.append((self._signal, self._copy, self._targets))
                self._copy = None
                raise PullTimeoutError(self._trainer_rank, timeout_s)
            try:
                self._stream.query()
            except RuntimeError as error:  # torch's own class for it differs between versions
                raise TransportError(
                    f"reading trainer rank {self._trainer_rank} failed on the GPU: {error}. The device's "
                    "context is lost; restart this engine."
                ) from error

    def _check_source(self) -> None:
        try:
            self._lifeline.check()
        except LifelineBrokenError as error:
            raise SourceDiedError(self._trainer_rank, str(error)) from error

    def close(self) -> None:
        """Unmap the source's memory."""
        self._lifeline.close()
        self._copy = None
        mapped, self._mapped = self._mapped, []
        with torch.cuda.device(self._device):
            for address in mapped:
                try:
                    cuda_driver.unmap_allocation(address)
                except CudaDriverError:
                    continue  # a lost context unmaps all by itself


_abandoned: list[object] = []
"""Signals, tables and targets of copies that ran over their deadline: still in use by the device."""


class CudaIpcTransport:
    """See :class:`rdt_core.transports.base.Transport`.

    Raises:
        TransportUnavailableError: this process has no NVIDIA GPU.
    """

    name = "cuda_ipc"
    takes_rows = True
    is_live = True

    def __init__(self) -> None:
        if torch.version.cuda is None or not torch.cuda.is_available():
            raise TransportUnavailableError(
                "cuda_ipc", "this process sees no NVIDIA GPU", "Use transport='nixl'."
            )

    def register(self, views: Sequence[torch.Tensor]) -> contextlib.ExitStack:
        """Nothing is registered."""
        del views
        return contextlib.ExitStack()

    def export(self, views: Sequence[torch.Tensor]) -> CudaIpcExport:
        """Share the views' allocations with readers of this host.

        Raises:
            TransportError: the views are not on one GPU, or of a kind of memory that cannot be shared.
        """
        return CudaIpcExport(views, _device_of(views))

    def open(self, ticket: object, targets: Sequence[torch.Tensor], *, trainer_rank: int) -> CudaIpcLink:
        """Map the export for the targets' device."""
        parsed = CudaIpcTicket.parse(ticket)
        if parsed.host != host_identity():
            raise TransportError(
                f"trainer rank {trainer_rank} is on another host. CUDA IPC reaches processes of one host "
                "only; use transport='nixl'."
            )
        wanted = [_shape_of(target) for target in targets]
        offered = [(rows.num_rows, rows.row_nbytes) for _, rows in parsed.rows()]
        if wanted != offered:
            raise TransportError(
                f"targets of {_describe(wanted)} cannot take an export of {_describe(offered)}. Both sides "
                "must replay the same plan."
            )
        return CudaIpcLink(parsed, targets, _device_of(targets), trainer_rank)


def _device_of(tensors: Sequence[torch.Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise TransportError(
            f"memory on {sorted(map(str, devices))} cannot be read by CUDA IPC, which needs all of a rank's "
            "memory on one GPU. Use transport='nixl'."
        )
    return devices.pop()


def _shape_of(view: torch.Tensor) -> tuple[int, int]:
    """Rows and bytes of a row."""
    return (1, view.shape[0]) if view.dim() == 1 else (view.shape[0], view.shape[1])


def _describe(shapes: Sequence[tuple[int, int]]) -> str:
    nbytes = sum(num_rows * row_nbytes for num_rows, row_nbytes in shapes)
    return f"{len(shapes)} ranges, {sum(num_rows for num_rows, _ in shapes)} rows, {nbytes} bytes"


def _share(views: Sequence[torch.Tensor]) -> tuple[list[bytes], list[tuple[int, Rows]]]:
    """Handles of all allocations behind the views, and where in them each view lies."""
    handles: dict[int, bytes] = {}
    order: dict[int, int] = {}
    rows = []
    for view in views:
        if not view.numel():
            rows.append((0, Rows(0, 0)))
            continue
        address = view.data_ptr()
        try:
            base, _ = cuda_driver.find_allocation(address)
            if base not in handles:
                handles[base] = cuda_driver.export_allocation(base)
        except CudaDriverError as error:
            raise TransportError(
                f"memory of this trainer rank cannot be shared by CUDA IPC: {error}. Expandable segments "
                "cannot: take expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF (PYTORCH_ALLOC_CONF)."
            ) from error
        index = order.setdefault(base, len(order))
        num_rows, row_nbytes = _shape_of(view)
        rows.append(
            (index, Rows(address - base, row_nbytes, num_rows, view.stride(0) if num_rows > 1 else 0))
        )
    return list(handles.values()), rows


@functools.cache
def host_identity() -> str:
    """Tells hosts apart; alike in all containers of one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def device_identity(device: torch.device) -> str:
    """The device's UUID, which does not depend on ``CUDA_VISIBLE_DEVICES``."""
    return str(torch.cuda.get_device_properties(device).uuid)
