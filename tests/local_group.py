"""A whole sync group in this process: real publishers, real engine servers on loopback, no Ray.

For tests of what stands in front of ``WeightSync``. Bytes move by the memory transport, metadata over a
:class:`rdt_core.client.LocalChannel`; HTTP is real.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import uvicorn

from rdt_core.client import LocalChannel
from rdt_core.sync import WeightSync
from tests.integration.toy_engine import make_app
from tests.integration.toy_trainer import ToyTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

START_TIMEOUT_S = 60.0


@contextlib.contextmanager
def serve(app: FastAPI | Any) -> Iterator[str]:
    """Serve an app on a free loopback port from a thread of this process; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        if not server.started:
            raise RuntimeError("the server ended before it served")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_TIMEOUT_S)


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(is_true: Any, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait on a condition that another thread makes true."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{is_true} did not come true within {timeout_s} s")
        pause.wait(0.02)


class LocalGroup:
    """Two trainer ranks and their coordinator, attached as group ``policy``."""

    name = "policy"

    def __init__(self, world_size: int = 2) -> None:
        self.channel = LocalChannel(self.name)
        self.trainers = [ToyTrainer(rank, world_size) for rank in range(world_size)]
        self.version = 0

    def attach(self) -> None:
        """Attach every trainer rank."""
        for trainer in self.trainers:
            trainer.attach(self.name, self.channel)

    def write(self) -> int:
        """One optimizer step in every rank; returns the version that its values belong to."""
        self.version += 1
        for trainer in self.trainers:
            trainer.write(self.version)
        return self.version

    def write_and_publish(self) -> int:
        """One optimizer step in every rank, published; returns the version."""
        version = self.write()
        for trainer in self.trainers:
            trainer.publish(version)
        return version

    def connect(self, *engines: str, **options: Any) -> WeightSync:
        """A driver of this group."""
        return WeightSync.connect(
            self.name, engines, transport="memory", channel=self.channel, timeout_s=60.0, **options
        )

    def serve_engine(self, *api_keys: str) -> contextlib.AbstractContextManager[str]:
        """An engine server that can join this group."""
        return serve(make_app(100, torch.float32, api_keys, channel=self.channel))

    def close(self) -> None:
        """End publishers and coordinator."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(ToyTrainer.close, self.trainers))
        self.channel.end()


@contextlib.contextmanager
def local_group(world_size: int = 2) -> Iterator[LocalGroup]:
    """An attached group."""
    group = LocalGroup(world_size)
    group.attach()
    try:
        yield group
    finally:
        group.close()
