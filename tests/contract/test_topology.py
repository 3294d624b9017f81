"""Trainers that come back in another layout are planned for anew; with other tensors they are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from rdt_core import transports
from rdt_core.client import LocalChannel
from rdt_core.errors import TopologyChangedError
from rdt_core.roster import SILENT_S
from tests.contract import gated
from tests.contract.world import GROUP, Clock, Engine, expected_fingerprint
from tests.integration.toy_trainer import ToyTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator


class Trainers:
    """Trainer ranks that can be replaced by others of another layout."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.channel = LocalChannel(GROUP, self.clock)
        self.ranks: list[ToyTrainer] = []

    def start(self, num_ranks: int, *, dim: int = 0, dtype: str = "float32") -> None:
        self.ranks = [ToyTrainer(rank, num_ranks, dim=dim, dtype=dtype) for rank in range(num_ranks)]
        for rank in self.ranks:
            rank.attach(GROUP, self.channel)

    def publish(self, version: int) -> None:
        for rank in self.ranks:
            rank.write(version)
        for rank in self.ranks:
            rank.publish(version)

    def die(self) -> None:
        """Fall silent without a word, as processes that are killed."""
        for rank in self.ranks:
            publisher = rank.publisher
            publisher._is_closed.set()
            publisher._tasks.put(None)
            for thread in publisher._threads:
                thread.join(30)
            publisher._exports.close()
        self.clock.skip(2 * SILENT_S)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainers]:
    monkeypatch.setitem(transports._FACTORIES, gated.NAME, "tests.contract.gated:GatedTransport")
    gated.reset()
    made = Trainers()
    yield made
    for rank in made.ranks:
        rank.close()
    made.channel.end()


def take(engine: Engine, version: int) -> None:
    engine.subscriber.prepare(version)
    engine.subscriber.commit(version)


@pytest.mark.parametrize("mode", ["staged", "inplace"])
def test_trainers_that_come_back_cut_along_another_dim_are_planned_anew(
    trainers: Trainers, mode: str
) -> None:
    trainers.start(2)
    engine = Engine(trainers.channel)
    before = engine.connect(mode)
    trainers.publish(1)
    take(engine, 1)
    trainers.die()
    trainers.start(3, dim=1)
    trainers.publish(2)
    take(engine, 2)
    assert engine.fingerprint == expected_fingerprint(2)
    (row,) = trainers.channel.call("status", timeout_s=30.0)["engines"]
    assert (set(before["trainers"]), set(row["trainers"])) == ({0, 1}, {0, 1, 2})
    engine.subscriber.disconnect()


def test_trainers_that_come_back_with_other_tensors_are_refused_until_the_engine_connects_again(
    trainers: Trainers,
) -> None:
    trainers.start(2)
    engine = Engine(trainers.channel)
    engine.connect()
    trainers.publish(1)
    take(engine, 1)
    trainers.die()
    trainers.start(2, dtype="bfloat16")
    trainers.publish(2)
    with pytest.raises(TopologyChangedError, match="other names, shapes or dtypes"):
        engine.subscriber.prepare(2)
    assert engine.fingerprint == expected_fingerprint(1)
    assert engine.connect()["version"] == 1
    take(engine, 2)
    assert engine.fingerprint != expected_fingerprint(1)
    held = torch.cat([engine.model.qkv, engine.model.embed])
    assert torch.equal(held, held.bfloat16().float())
    engine.subscriber.disconnect()


def test_a_coordinator_that_dies_after_the_trainers_leaves_engines_serving_and_new_trainers_are_found(
    trainers: Trainers,
) -> None:
    trainers.start(2)
    engine = Engine(trainers.channel)
    engine.connect()
    trainers.publish(3)
    take(engine, 3)
    trainers.die()
    trainers.channel.restart()
    assert engine.fingerprint == expected_fingerprint(3)
    trainers.start(1)
    trainers.publish(4)
    take(engine, 4)
    assert engine.fingerprint == expected_fingerprint(4)
    engine.subscriber.disconnect()
