"""A trainer-side stand for transport contract tests, in this process or in another one."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Protocol

import psutil
import ray
import torch

from rdt_core.row_views import view_rows
from rdt_core.transports import make_transport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdt_core.row_blocks import Rows
    from rdt_core.transports.base import Export, Transport


def device_of(transport: str) -> torch.device:
    """Where a transport's memory lies in these tests."""
    return torch.device("cuda:0" if transport == "cuda_ipc" else "cpu")


class Source(Protocol):
    """Memory that a test can write, and exports of all of it, one a reader."""

    def export(self, rows: Sequence[Rows] | None = None) -> object:
        """Export every tensor, or of each these rows; returns the ticket."""

    def write(self, index: int, values: Sequence[int]) -> None:
        """Overwrite one tensor's bytes in place."""

    def publish(self, version: int) -> None:
        """Refresh every export, as a publisher does once its memory holds a version."""

    def close(self) -> None:
        """Close every export."""

    def kill(self) -> None:
        """End the source as a crash would."""


class LocalSource:
    """A source in this process."""

    def __init__(self, transport: Transport, sizes: Sequence[int]) -> None:
        self._transport = transport
        device = device_of(transport.name)
        self._tensors = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
        self._exports: list[Export] = []
        self._version = 0

    def export(self, rows: Sequence[Rows] | None = None) -> object:
        views = (
            [view_rows(*pair) for pair in zip(self._tensors, rows, strict=True)] if rows else self._tensors
        )
        export = self._transport.export(views)
        export.refresh(self._version)
        self._exports.append(export)
        return export.ticket

    def write(self, index: int, values: Sequence[int]) -> None:
        self._tensors[index].copy_(torch.tensor(values, dtype=torch.uint8))
        if self._tensors[index].is_cuda:
            torch.cuda.synchronize()

    def publish(self, version: int) -> None:
        self._version = version
        for export in self._exports:
            export.refresh(version)

    def free(self, index: int) -> None:
        """Give a tensor's memory back while it is exported, as a trainer must not."""
        self._tensors[index].untyped_storage().resize_(0)

    def close(self) -> None:
        exports, self._exports = self._exports, []
        for export in exports:
            export.close()

    def kill(self) -> None:
        self._exports.clear()


class _SourceActor:
    def __init__(self, name: str, sizes: Sequence[int], env: Mapping[str, str]) -> None:
        os.environ.update(env)
        self._source = LocalSource(make_transport(name), sizes)

    def pid(self) -> int:
        return os.getpid()

    def export(self, rows: Sequence[Rows] | None = None) -> object:
        return self._source.export(rows)

    def write(self, index: int, values: Sequence[int]) -> None:
        self._source.write(index, values)

    def publish(self, version: int) -> None:
        self._source.publish(version)

    def free(self, index: int) -> None:
        self._source.free(index)

    def close(self) -> None:
        self._source.close()


class ActorSource:
    """A source in a Ray actor, a process of its own."""

    def __init__(self, name: str, sizes: Sequence[int], env: Mapping[str, str] | None = None) -> None:
        # Ray hides every GPU from an actor that asks for none.
        num_gpus = 0.01 if device_of(name).type == "cuda" else 0
        self._actor = (
            ray.remote(_SourceActor).options(num_cpus=0, num_gpus=num_gpus).remote(name, sizes, env or {})
        )
        self.pid = int(ray.get(self._actor.pid.remote(), timeout=60))

    def export(self, rows: Sequence[Rows] | None = None) -> object:
        return ray.get(self._actor.export.remote(rows), timeout=60)

    def write(self, index: int, values: Sequence[int]) -> None:
        ray.get(self._actor.write.remote(index, values), timeout=60)

    def publish(self, version: int) -> None:
        ray.get(self._actor.publish.remote(version), timeout=60)

    def free(self, index: int) -> None:
        ray.get(self._actor.free.remote(index), timeout=60)

    def close(self) -> None:
        ray.get(self._actor.close.remote(), timeout=60)

    def kill(self) -> None:
        """Return once the process is gone, which ``ray.kill`` alone does not wait for."""
        ray.kill(self._actor)
        deadline = time.monotonic() + 60
        while psutil.pid_exists(self.pid) and time.monotonic() < deadline:
            threading.Event().wait(0.02)
