"""What a subscriber promises: old or new whole, never a mix, and never a wait on the model's thread."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from rdt_core.client import LocalChannel
from rdt_core.errors import (
    AbortedError,
    EngineAsleepError,
    LeaseLostError,
    NotPreparedError,
    NotPublishedError,
    RdtError,
    ReleasedError,
    SourceDiedError,
    StaleVersionError,
    SupersededError,
    TornReadError,
)
from rdt_core.roster import SILENT_S
from tests.contract import gated
from tests.contract.world import Clock, Engine, TrainerRank, World, expected_fingerprint
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S = 60.0


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

    def __init__(self, engine: Engine, version: int, verify: str | None = None) -> None:
        self._engine, self._version, self._verify = engine, version, verify
        self._error: RdtError | None = None
        gated.gate.close()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        gated.gate.wait_until_reached()

    def _read(self) -> None:
        try:
            self._engine.subscriber.prepare(self._version, timeout_s=TIMEOUT_S, verify=self._verify)
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


class Writer:
    """``publisher.writing()`` in every rank, each in a thread of its own as in a process of its own."""

    def __init__(self, world: World, timeout_s: float) -> None:
        self._threads = [
            threading.Thread(target=self._write, args=(rank, timeout_s)) for rank in world.trainers
        ]
        self.num_entered = 0
        self._lock = threading.Lock()
        for thread in self._threads:
            thread.start()

    def _write(self, rank: TrainerRank, timeout_s: float) -> None:
        with rank.publisher.writing(timeout_s=timeout_s), self._lock:
            self.num_entered += 1

    def finish(self) -> None:
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        assert self.num_entered == len(self._threads)


def test_a_trainer_that_writes_waits_for_the_reader_which_gets_its_version_whole(
    world: World, engine: Engine, version: int
) -> None:
    engine.connect()
    reader = Reader(engine, version)
    writer = Writer(world, timeout_s=TIMEOUT_S)
    wait_for(lambda: all(rank["writing"] for rank in world.client.status()["trainers"].values()))
    assert writer.num_entered == 0
    assert reader.finish() is None
    writer.finish()
    engine.subscriber.commit(version)
    assert engine.fingerprint == expected_fingerprint(version)


def test_past_its_deadline_a_trainer_writes_and_the_reader_fails_cleanly(
    world: World, engine: Engine, version: int
) -> None:
    engine.connect()
    engine.subscriber.prepare(version)
    engine.subscriber.commit(version)
    world.publish(version + 1)
    reader = Reader(engine, version + 1)
    Writer(world, timeout_s=0.1).finish()
    assert isinstance(reader.finish(), LeaseLostError | ReleasedError)
    with pytest.raises(NotPreparedError):
        engine.subscriber.commit(version + 1)
    assert engine.fingerprint == expected_fingerprint(version)
    world.publish(version + 2)
    engine.subscriber.prepare(version + 2)
    engine.subscriber.commit(version + 2)
    assert engine.fingerprint == expected_fingerprint(version + 2)


def test_what_a_trainer_released_cannot_be_read(world: World, engine: Engine, version: int) -> None:
    engine.connect()
    for rank in world.trainers:
        rank.publisher.release()
    with pytest.raises(ReleasedError):
        engine.subscriber.prepare(version)


def test_a_step_that_raises_leaves_nothing_to_read(world: World, engine: Engine, version: int) -> None:
    engine.connect()
    with pytest.raises(ZeroDivisionError), world.trainers[0].publisher.writing():
        raise ZeroDivisionError
    with pytest.raises(ReleasedError):
        engine.subscriber.prepare(version)


def test_a_lease_does_not_outlive_a_read_that_failed(world: World, engine: Engine, version: int) -> None:
    engine.connect()
    gated.gate.failure = SourceDiedError(0, "killed by the test")
    with pytest.raises(SourceDiedError):
        engine.subscriber.prepare(version)
    assert world.client.status()["leases"] == []


@pytest.mark.parametrize("mode", ["staged", "inplace"])
def test_digests_of_a_read_that_nobody_disturbed_agree(engine: Engine, version: int, mode: str) -> None:
    engine.connect(mode)
    engine.subscriber.prepare(version, verify="digest")
    engine.subscriber.commit(version, verify="digest")
    assert engine.fingerprint == expected_fingerprint(version)


def test_a_write_in_mid_read_without_a_word_is_found_by_digest(
    world: World, engine: Engine, version: int
) -> None:
    engine.connect()
    reader = Reader(engine, version, verify="digest")
    for rank in world.trainers:
        rank.write(version + 1)
    assert isinstance(reader.finish(), TornReadError)


def test_a_torn_read_in_place_is_found_by_digest_and_the_engine_refuses_to_serve(
    world: World, engine: Engine, version: int
) -> None:
    engine.connect("inplace")
    engine.subscriber.prepare(version)

    def write_without_a_word() -> None:
        for rank in world.trainers:
            rank.write(version + 1)

    gated.gate.on_reach = write_without_a_word
    with pytest.raises(TornReadError):
        engine.subscriber.commit(version, verify="digest")
    assert engine.subscriber.is_torn


@pytest.mark.parametrize("mode", ["staged", "inplace"])
def test_the_weights_of_an_engine_that_sleeps_are_not_touched(
    world: World, engine: Engine, version: int, mode: str
) -> None:
    engine.connect(mode)
    engine.subscriber.prepare(version)
    before = engine.fingerprint
    engine.engine_model.is_asleep = True
    for touch in (
        lambda: engine.subscriber.commit(version),
        lambda: engine.subscriber.prepare(version),
        lambda: engine.subscriber.start_prepare(version, "asleep"),
        lambda: engine.subscriber.lend(version),
        engine.subscriber.digests,
        lambda: engine.connect(mode),
    ):
        with pytest.raises(EngineAsleepError):
            touch()
    assert engine.fingerprint == before
    assert engine.subscriber.status()["is_asleep"]
    engine.engine_model.is_asleep = False
    engine.subscriber.commit(version)
    assert engine.fingerprint == expected_fingerprint(version)


def test_a_restarted_trainer_is_read_without_a_reconnect_and_versions_go_on(
    shared_world: World,
) -> None:
    assert shared_world.trainers
    clock = Clock()
    channel = LocalChannel("policy", clock)
    old = World(channel, [TrainerRank(channel, rank, 2) for rank in range(2)])
    engine = Engine(channel)
    engine.connect()
    old.publish(7)
    engine.subscriber.prepare(7)
    engine.subscriber.commit(7)
    for rank in old.trainers:
        rank.die()
    clock.skip(2 * SILENT_S)
    new = World(channel, [TrainerRank(channel, rank, 3) for rank in range(3)])
    assert new.trainers[0].publisher.version == 7
    with pytest.raises(NotPublishedError):
        engine.subscriber.prepare(8)
    new.publish(8)
    engine.subscriber.prepare(8)
    engine.subscriber.commit(8)
    assert engine.fingerprint == expected_fingerprint(8)
    assert engine.subscriber.status()["group"] == "policy"
    engine.subscriber.disconnect()
    new.close()


@pytest.mark.parametrize("mode", ["staged", "inplace"])
def test_a_coordinator_that_was_restarted_learns_everything_from_its_members(
    world: World, engine: Engine, version: int, mode: str
) -> None:
    engine.connect(mode)
    session = world.client.session()
    world.channel.restart()
    wait_for(lambda: len(world.client.status()["trainers"]) == len(world.trainers))
    assert world.client.session() == session
    engine.subscriber.prepare(version)
    engine.subscriber.commit(version)
    assert engine.fingerprint == expected_fingerprint(version)
    assert [row["engine"] for row in world.client.status()["engines"]] == [engine.name]
    world.publish(version + 1)
    engine.subscriber.prepare(version + 1)
    engine.subscriber.commit(version + 1)
    assert engine.fingerprint == expected_fingerprint(version + 1)


def test_a_version_that_was_taken_back_stays_taken_back_over_a_restart(
    world: World, engine: Engine, version: int
) -> None:
    engine.connect()
    for rank in world.trainers:
        rank.publisher.release()
    world.channel.restart()
    wait_for(lambda: len(world.client.status()["trainers"]) == len(world.trainers))
    with pytest.raises(ReleasedError):
        engine.subscriber.prepare(version)


def test_a_read_under_way_when_the_coordinator_is_lost_does_not_count(
    world: World, engine: Engine, version: int
) -> None:
    engine.connect()
    reader = Reader(engine, version)
    world.channel.restart()
    wait_for(lambda: len(world.client.status()["trainers"]) == len(world.trainers))
    assert isinstance(reader.finish(), LeaseLostError)
    with pytest.raises(NotPreparedError):
        engine.subscriber.commit(version)
    engine.subscriber.prepare(version)
    engine.subscriber.commit(version)
    assert engine.fingerprint == expected_fingerprint(version)
