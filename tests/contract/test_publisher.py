"""What a publisher does with the exporter's own calls, without Ray."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

from rdt_core import LocalShards, WeightPublisher
from rdt_core.client import CoordinatorClient, LocalChannel
from rdt_core.coordinator import POLL_S
from rdt_core.errors import CoordinatorLostError, RdtError, WindowMovedError
from rdt_core.local_shards import LocalShard
from rdt_core.manifest import TensorSpec
from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Parameter:
    """One tensor of a trainer, and the values that its framework has put off."""

    def __init__(self) -> None:
        self.data, self.pending = torch.zeros(4), torch.zeros(4)

    def complete(self) -> None:
        """Write in place what was put off."""
        self.data.copy_(self.pending)

    def move(self) -> None:
        """Write it elsewhere."""
        self.data = self.pending.clone()


@pytest.fixture
def channel() -> Iterator[LocalChannel]:
    """A coordinator in this process."""
    channel = LocalChannel("policy")
    yield channel
    channel.end()


def attach(
    channel: LocalChannel, held: Parameter, refresh: Callable[[], None], copied_bytes: int = 0
) -> WeightPublisher:
    shard = LocalShard(
        spec=TensorSpec("w", (4,), "float32"), region=Region((0,), (4,)), data=held.data, owner="w"
    )
    local = LocalShards(
        rank=0,
        world_size=1,
        shards=(shard,),
        locate=lambda: (held.data.data_ptr(),),
        refresh=refresh,
        copied_bytes=copied_bytes,
    )
    return WeightPublisher.attach("policy", local, channel=channel)


def test_every_publish_first_completes_what_the_framework_put_off(channel: LocalChannel) -> None:
    held = Parameter()
    with attach(channel, held, held.complete) as publisher:
        for version in (1, 2):
            held.pending = torch.full((4,), float(version))
            publisher.publish(version)
            assert torch.equal(held.data, held.pending)


def test_a_parameter_that_moves_while_it_is_completed_is_noticed(channel: LocalChannel) -> None:
    held = Parameter()
    with attach(channel, held, held.move) as publisher, pytest.raises(WindowMovedError):
        publisher.publish(1)


def test_nobody_reads_while_an_exporter_fills_its_copies(channel: LocalChannel) -> None:
    held, client = Parameter(), CoordinatorClient(channel)
    with attach(channel, held, held.complete, copied_bytes=16) as publisher, ThreadPoolExecutor(1) as pool:
        publisher.publish(1)
        assert publisher.arena_bytes == 16
        client.join("engine", 0, {})
        lease = client.begin_read("engine", 0, 1, client.topology(), 30.0)
        held.pending = torch.ones(4)
        published = pool.submit(publisher.publish, 2)
        # Once the rank is known to write, publish waits for the reader, and nothing has been filled.
        wait_until(lambda: client.status()["trainers"][0]["writing"])
        assert not held.data.any()
        client.drop_lease(lease)
        published.result(30)
        assert bool(held.data.all())


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline


class SlowDigests(WeightPublisher):
    """Digests once it is told to, as if there were very much to read."""

    begun, may_end = threading.Event(), threading.Event()

    def _digest(self, dtypes: dict[str, str]) -> Any:
        self.begun.set()
        assert self.may_end.wait(30)
        return super()._digest(dtypes)


def test_a_rank_that_digests_for_long_goes_on_giving_signs_of_life(channel: LocalChannel) -> None:
    held, client = Parameter(), CoordinatorClient(channel)
    shard = LocalShard(
        spec=TensorSpec("w", (4,), "float32"), region=Region((0,), (4,)), data=held.data, owner="w"
    )
    local = LocalShards(
        rank=0, world_size=1, shards=(shard,), locate=lambda: (held.data.data_ptr(),), refresh=held.complete
    )
    with SlowDigests.attach("policy", local, channel=channel), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.ask, "digest", {0: {"w": "float32"}}, 30.0)
        assert SlowDigests.begun.wait(30)
        begun = time.monotonic()
        while time.monotonic() - client.status()["trainers"][0]["silent_s"] < begun + 0.1:
            assert time.monotonic() < begun + 20
        SlowDigests.may_end.set()
        assert asked.result(30)[0][0].tensor == "w"


def test_a_rank_that_misses_its_coordinator_for_long_serves_again_when_there_is_one(
    channel: LocalChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = CoordinatorClient.next_tasks

    def next_tasks(self: CoordinatorClient, *args: Any) -> Any:
        asked.append(len(asked))
        if len(asked) == 1:
            raise RdtError("it failed")
        if len(asked) < 4:
            raise CoordinatorLostError("policy", "it starts")
        return original(self, *args)

    monkeypatch.setattr(CoordinatorClient, "next_tasks", next_tasks)
    monkeypatch.setattr("rdt_core.publisher._LOST_PAUSE_S", 0.01)
    held = Parameter()
    with attach(channel, held, held.complete) as publisher:
        publisher.publish(1)
        client = CoordinatorClient(channel)
        digests = client.ask("digest", {0: {"w": "float32"}}, 30.0)
    assert [digest.tensor for digest in digests[0]] == ["w"]
    assert len(asked) >= 4


def test_a_rank_that_closes_does_not_wait_for_its_poll(channel: LocalChannel) -> None:
    held = Parameter()
    started = time.monotonic()
    attach(channel, held, held.complete).close()
    assert time.monotonic() - started < POLL_S / 2
