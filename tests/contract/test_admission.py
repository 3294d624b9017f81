"""Engines that were asked before the publication are admitted at it, whatever the trainers do next."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from rdt_core.connection import Connection
from rdt_core.errors import AbortedError
from tests.contract.world import Engine, World, expected_fingerprint
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_core.admission import Admission
    from rdt_core.words import Outcome

TIMEOUT_S = 60.0


@pytest.fixture
def engine(world: World) -> Iterator[Engine]:
    made = Engine(world.channel)
    yield made
    made.subscriber.disconnect()


@pytest.fixture
def version(world: World) -> int:
    """The next version, written and not published."""
    number = world.trainers[0].publisher.version + 1
    for trainer in world.trainers:
        trainer.write(number)
    return number


def publish_and_take_back(world: World, version: int) -> threading.Thread:
    """Publish in every rank, and begin the next step at once."""
    for trainer in world.trainers:
        trainer.publisher.publish(version)
    taking_back = [threading.Thread(target=trainer.publisher.release) for trainer in world.trainers]

    def take_back() -> None:
        for thread in taking_back:
            thread.start()
        for thread in taking_back:
            thread.join(TIMEOUT_S)

    begun = threading.Thread(target=take_back)
    begun.start()
    return begun


def outcome_of(world: World, engine: Engine, attempt: str) -> Outcome:
    members = [(engine.name, 0)]
    life = world.client.status()["life"]
    return world.client.wait_prepared(attempt, members, life, TIMEOUT_S)[members[0]]


def test_a_read_that_waited_is_done_though_the_trainers_begin_to_write_at_once(
    engine: Engine, world: World, version: int
) -> None:
    engine.connect()
    for number in range(version, version + 5):
        for trainer in world.trainers:
            trainer.write(number)
        engine.subscriber.start_prepare(number, f"{number}", awaits_publication=True)
        wait_for(lambda: engine.subscriber._is_awaiting)
        taking_back = publish_and_take_back(world, number)
        outcome = outcome_of(world, engine, f"{number}")
        taking_back.join(TIMEOUT_S)
        assert outcome.error is None, outcome.error
        engine.subscriber.commit(number)
        assert engine.fingerprint == expected_fingerprint(number)
    assert world.client.status()["leases"] == []


def test_a_read_that_is_taken_back_while_it_waits_holds_no_trainer_up(
    engine: Engine, world: World, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The abort comes between the lease and the read."""
    engine.connect()
    admit = Connection.admit

    def admit_and_abort(connection: Connection, *args: float) -> Admission | None:
        found = admit(connection, *args)  # type: ignore[arg-type]  # as they came
        if found is not None:
            engine.subscriber.abort()
        return found

    monkeypatch.setattr(Connection, "admit", admit_and_abort)
    engine.subscriber.start_prepare(version, "given up", awaits_publication=True)
    for trainer in world.trainers:
        trainer.publisher.publish(version)
    assert isinstance(outcome_of(world, engine, "given up").error, AbortedError)
    assert world.client.status()["leases"] == []
    for trainer in world.trainers:
        trainer.publisher.release(timeout_s=TIMEOUT_S)


def test_in_place_the_version_is_checked_by_the_word_that_it_is_there(
    engine: Engine, world: World, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.connect(mode="inplace")
    checks: list[int] = []
    monkeypatch.setattr(Connection, "check", lambda self, number: checks.append(number))
    engine.subscriber.start_prepare(version, "in place", awaits_publication=True)
    for trainer in world.trainers:
        trainer.publisher.publish(version)
    assert outcome_of(world, engine, "in place").error is None
    assert checks == []
    engine.subscriber.commit(version)
    assert engine.fingerprint == expected_fingerprint(version)
