"""What a subscriber promises: old or new whole, never a mix, and never a wait on the model's thread."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from rdt_core import transports
from rdt_core.errors import (
    AbortedError,
    NotPreparedError,
    RdtError,
    SourceDiedError,
    StaleVersionError,
    SupersededError,
)
from tests.contract import gated
from tests.contract.world import Engine, World, expected_fingerprint, make_world

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    world = make_world()
    yield world
    world.close()


@pytest.fixture
def world(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Two attached trainer ranks, and a gated transport for their readers."""
    monkeypatch.setitem(transports._FACTORIES, gated.NAME, "tests.contract.gated:GatedTransport")
    gated.reset()
    yield shared_world
    gated.reset()


@pytest.fixture
def version(world: World) -> int:
    """A version that all ranks have just published."""
    published = world.trainers[0].publisher.version + 1
    world.publish(published)
    return published


@pytest.fixture
def engine(world: World) -> Iterator[Engine]:
    made = Engine(world.channel)
    yield made
    made.subscriber.disconnect()


class Reader:
    """A prepare in a thread of its own, stopped in the middle of its first pull."""

    def __init__(self, engine: Engine, version: int) -> None:
        self._engine, self._version = engine, version
        self._error: RdtError | None = None
        gated.gate.close()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        gated.gate.wait_until_reached()

    def _read(self) -> None:
        try:
            self._engine.subscriber.prepare(self._version, timeout_s=TIMEOUT_S)
        except RdtError as error:
            self._error = error

    def finish(self) -> RdtError | None:
        """Open the gate; how the prepare ended."""
        gated.gate.opened.set()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self._error


@pytest.mark.parametrize("mode", ["staged", "inplace"])
def test_a_version_lands_whole(world: World, engine: Engine, version: int, mode: str) -> None:
    engine.connect(mode)
    engine.subscriber.prepare(version)
    assert engine.subscriber.version == 0
    engine.subscriber.commit(version)
    assert engine.fingerprint == expected_fingerprint(version)
    assert engine.subscriber.version == version


def test_in_place_mode_takes_no_landing_memory_for_what_it_reads_directly(
    engine: Engine, version: int
) -> None:
    staged, in_place = engine.connect("staged"), engine.connect("inplace")
    assert staged["landing_nbytes"] >= staged["nbytes"]
    assert in_place["landing_nbytes"] == 0
    assert in_place["read_nbytes"] == staged["read_nbytes"]


def test_staged_is_chosen_when_there_is_room(engine: Engine, version: int) -> None:
    assert engine.connect("auto")["mode"] == "staged"


def test_preparing_in_place_touches_nothing(engine: Engine, version: int) -> None:
    engine.connect("inplace")
    before = engine.fingerprint
    engine.subscriber.prepare(version)
    assert engine.fingerprint == before


def test_a_read_that_fails_in_place_tears_the_model_and_the_next_version_repairs_it(
    world: World, engine: Engine, version: int
) -> None:
    engine.connect("inplace")
    engine.subscriber.prepare(version)
    gated.gate.failure = SourceDiedError(0, "killed by the test")
    with pytest.raises(SourceDiedError):
        engine.subscriber.commit(version)
    assert engine.subscriber.is_torn
    assert engine.subscriber.version == 0
    gated.reset()
    world.publish(version + 1)
    engine.subscriber.prepare(version + 1)
    assert engine.subscriber.is_torn
    engine.subscriber.commit(version + 1)
    assert not engine.subscriber.is_torn
    assert engine.fingerprint == expected_fingerprint(version + 1)


def test_a_torn_model_stays_torn_over_a_reconnect_and_the_same_version_repairs_it(
    engine: Engine, version: int
) -> None:
    engine.connect("inplace")
    engine.subscriber.prepare(version)
    gated.gate.failure = SourceDiedError(0, "killed by the test")
    with pytest.raises(SourceDiedError):
        engine.subscriber.commit(version)
    gated.reset()
    engine.connect("staged")
    assert engine.subscriber.is_torn
    engine.subscriber.prepare(version)
    engine.subscriber.commit(version)
    assert not engine.subscriber.is_torn
    assert engine.fingerprint == expected_fingerprint(version)


def test_a_version_that_is_gone_at_an_in_place_commit_changes_nothing(
    world: World, engine: Engine, version: int
) -> None:
    engine.connect("inplace")
    before = engine.fingerprint
    engine.subscriber.prepare(version)
    world.publish(version + 1)
    with pytest.raises(SupersededError):
        engine.subscriber.commit(version)
    assert not engine.subscriber.is_torn
    assert engine.fingerprint == before


def test_a_read_that_fails_beside_the_parameters_leaves_the_old_version(
    world: World, engine: Engine, version: int
) -> None:
    engine.connect()
    engine.subscriber.prepare(version)
    engine.subscriber.commit(version)
    world.publish(version + 1)
    gated.gate.failure = SourceDiedError(0, "killed by the test")
    with pytest.raises(SourceDiedError):
        engine.subscriber.prepare(version + 1)
    gated.reset()
    assert not engine.subscriber.is_torn
    assert engine.fingerprint == expected_fingerprint(version)
    engine.subscriber.prepare(version + 1)
    engine.subscriber.commit(version + 1)
    assert engine.fingerprint == expected_fingerprint(version + 1)


def test_an_abort_in_mid_read_does_not_wait_and_nothing_is_prepared(engine: Engine, version: int) -> None:
    engine.connect()
    reader = Reader(engine, version)
    engine.subscriber.abort()
    assert engine.subscriber.status()["state"] == "idle"
    assert isinstance(reader.finish(), AbortedError)
    with pytest.raises(NotPreparedError):
        engine.subscriber.commit(version)


def test_a_commit_in_mid_read_does_not_wait_and_is_refused(engine: Engine, version: int) -> None:
    engine.connect()
    before = engine.fingerprint
    reader = Reader(engine, version)
    with pytest.raises(NotPreparedError):
        engine.subscriber.commit(version)
    assert engine.fingerprint == before
    assert reader.finish() is None
    engine.subscriber.commit(version)
    assert engine.fingerprint == expected_fingerprint(version)


def test_a_disconnect_in_mid_read_does_not_wait_and_the_read_closes_its_links(
    engine: Engine, version: int
) -> None:
    engine.connect()
    connection = engine.subscriber._connection
    assert connection is not None
    reader = Reader(engine, version)
    engine.subscriber.disconnect()
    assert connection.links
    assert isinstance(reader.finish(), AbortedError)
    assert not connection.links


def test_a_new_connection_works_while_the_read_of_the_old_one_still_runs(
    engine: Engine, version: int
) -> None:
    engine.connect()
    reader = Reader(engine, version)
    engine.connect(transport="memory")
    engine.subscriber.prepare(version)
    engine.subscriber.commit(version)
    assert isinstance(reader.finish(), AbortedError)
    assert engine.fingerprint == expected_fingerprint(version)


def test_a_publish_in_mid_read_is_an_error_not_a_mix(world: World, engine: Engine, version: int) -> None:
    engine.connect()
    before = engine.fingerprint
    reader = Reader(engine, version)
    world.publish(version + 1)
    assert isinstance(reader.finish(), SupersededError)
    with pytest.raises(NotPreparedError):
        engine.subscriber.commit(version)
    assert engine.fingerprint == before


def test_a_committed_version_is_not_read_again(engine: Engine, version: int) -> None:
    engine.connect()
    engine.subscriber.prepare(version)
    engine.subscriber.commit(version)
    with pytest.raises(StaleVersionError):
        engine.subscriber.prepare(version)
