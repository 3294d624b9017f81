"""What a driver promises over several engines: all or none, members that come and go, failures by name."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from rdt_core import WeightSync
from rdt_core.errors import (
    BusyError,
    ClosedError,
    ConfigError,
    EngineAsleepError,
    EngineUnreachableError,
    NotConnectedError,
    NotPublishedError,
    SourceDiedError,
    StaleVersionError,
    SupersededError,
    UpdateFailedError,
)
from tests.contract import gated
from tests.contract.local_engine import LocalEngine
from tests.contract.world import GROUP, Clock, World, count_anew, expected_fingerprint
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT_S = 60.0


@pytest.fixture
def make_engine(world: World) -> Iterator[Callable[[str], LocalEngine]]:
    made: list[LocalEngine] = []

    def make(name: str) -> LocalEngine:
        made.append(LocalEngine(world.channel, name))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()


@pytest.fixture
def engines(make_engine: Callable[[str], LocalEngine]) -> list[LocalEngine]:
    return [make_engine(name) for name in ("a", "b")]


def connect(
    world: World, engines: list[LocalEngine], mode: str = "staged", transport: str = "memory"
) -> WeightSync:
    asked = {"group": GROUP, "transport": transport, "mode": mode, "timeout_s": TIMEOUT_S}
    sync = WeightSync(world.client, engines, asked)
    sync.join_all()
    return sync


@pytest.fixture
def sync(world: World, engines: list[LocalEngine]) -> Iterator[WeightSync]:
    """A driver of both engines, which serve a version."""
    with connect(world, engines) as made:
        made.update(publish_next(world), timeout_s=TIMEOUT_S)
        yield made


def publish_next(world: World) -> int:
    version = world.trainers[0].publisher.version + 1
    world.publish(version)
    return version


def test_one_engine_that_dies_before_the_read_keeps_all_from_committing(
    world: World, engines: list[LocalEngine], sync: WeightSync
) -> None:
    served, version = sync.version, publish_next(world)
    engines[1].is_dead = True
    with pytest.raises(UpdateFailedError) as caught:
        sync.update(version, timeout_s=TIMEOUT_S)
    assert (caught.value.phase, caught.value.engine) == ("prepare", "b")
    assert isinstance(caught.value.__cause__, EngineUnreachableError)
    assert engines[0].fingerprint == expected_fingerprint(served)
    engines[1].is_dead = False
    sync.update(version, timeout_s=TIMEOUT_S)
    assert engines[0].fingerprint == engines[1].fingerprint == expected_fingerprint(version)


def test_one_engine_that_sleeps_keeps_all_from_committing_until_it_is_woken(
    world: World, engines: list[LocalEngine], sync: WeightSync
) -> None:
    served, version = sync.version, publish_next(world)
    engines[1].engine_model.is_asleep = True
    with pytest.raises(UpdateFailedError) as caught:
        sync.update(version, timeout_s=TIMEOUT_S)
    assert (caught.value.phase, caught.value.engine) == ("prepare", "b")
    assert isinstance(caught.value.__cause__, EngineAsleepError)
    assert [engine.fingerprint for engine in engines] == [expected_fingerprint(served)] * 2
    engines[1].engine_model.is_asleep = False
    sync.update(version, timeout_s=TIMEOUT_S)
    assert [engine.fingerprint for engine in engines] == [expected_fingerprint(version)] * 2


def test_with_policy_engine_the_others_commit_and_the_one_that_failed_is_reported_and_catches_up(
    world: World, engines: list[LocalEngine], sync: WeightSync
) -> None:
    served, version = sync.version, publish_next(world)
    engines[1].is_dead = True
    report = sync.update(version, commit_policy="engine", timeout_s=TIMEOUT_S)
    assert engines[0].fingerprint == expected_fingerprint(version)
    assert engines[1].fingerprint == expected_fingerprint(served)
    (failure,) = report.failures
    assert (failure.engine, failure.phase, failure.error_type) == ("b", "prepare", "EngineUnreachableError")
    assert sync.version == served
    engines[1].is_dead = False
    again = sync.update(version, timeout_s=TIMEOUT_S)
    assert [row.engine for row in again.ranks] == ["b"]
    assert engines[1].fingerprint == expected_fingerprint(version)
    assert sync.version == version


def test_the_policy_of_a_driver_is_that_of_its_updates_unless_they_say_otherwise(
    world: World, engines: list[LocalEngine]
) -> None:
    asked = {"group": GROUP, "transport": "memory", "timeout_s": TIMEOUT_S}
    with pytest.raises(ConfigError, match="commit_policy"):
        WeightSync(world.client, engines, asked, commit_policy="some")
    with WeightSync(world.client, engines, asked, commit_policy="engine") as sync:
        sync.join_all()
        version = publish_next(world)
        engines[1].is_dead = True
        with pytest.raises(UpdateFailedError):
            sync.update(version, commit_policy="group", timeout_s=TIMEOUT_S)
        assert [row.engine for row in sync.update(version, timeout_s=TIMEOUT_S).ranks] == ["a"]
        engines[1].is_dead = False


def test_with_policy_engine_a_sync_that_fails_everywhere_raises(
    world: World, engines: list[LocalEngine], sync: WeightSync
) -> None:
    for engine in engines:
        engine.is_dead = True
    with pytest.raises(UpdateFailedError):
        sync.update(publish_next(world), commit_policy="engine", timeout_s=TIMEOUT_S)
    for engine in engines:
        engine.is_dead = False


def test_a_driver_notices_an_engine_that_dies_while_it_reads(
    world: World, engines: list[LocalEngine]
) -> None:
    sync = connect(world, engines, transport=gated.NAME)
    version = publish_next(world)
    gated.gate.close()
    gated.gate.on_reach = lambda: setattr(engines[1], "is_dead", True)
    with pytest.raises(UpdateFailedError) as caught:
        sync.update(version, timeout_s=10 * TIMEOUT_S)
    assert (caught.value.phase, caught.value.engine) == ("prepare", "b")
    gated.reset()
    engines[1].is_dead = False
    sync.close()


def test_a_failed_read_names_engine_rank_and_phase_and_the_next_update_works(
    world: World, engines: list[LocalEngine]
) -> None:
    sync = connect(world, engines, transport=gated.NAME)
    gated.gate.failure = SourceDiedError(1, "killed by the test")
    with pytest.raises(UpdateFailedError) as caught:
        sync.update(publish_next(world), timeout_s=TIMEOUT_S)
    assert (caught.value.phase, caught.value.rank) == ("prepare", 0)
    assert isinstance(caught.value.__cause__, SourceDiedError)
    gated.reset()
    version = publish_next(world)
    sync.update(version, timeout_s=TIMEOUT_S)
    assert engines[0].fingerprint == engines[1].fingerprint == expected_fingerprint(version)
    sync.close()


def test_a_change_of_mode_that_fails_leaves_the_old_version_serving_and_the_next_update_joins_again(
    world: World, engines: list[LocalEngine]
) -> None:
    sync = connect(world, engines, transport=gated.NAME)
    served = publish_next(world)
    sync.update(served, timeout_s=TIMEOUT_S)
    gated.gate.failure = SourceDiedError(1, "killed by the test")
    with pytest.raises(UpdateFailedError) as caught:
        sync.update(publish_next(world), mode="inplace", timeout_s=TIMEOUT_S)
    assert caught.value.phase == "prepare"
    assert [engine.subscriber.status()["state"] for engine in engines] == ["apart", "apart"]
    assert engines[0].fingerprint == engines[1].fingerprint == expected_fingerprint(served)
    gated.reset()
    version = publish_next(world)
    sync.update(version, mode="staged", timeout_s=TIMEOUT_S)
    assert engines[0].fingerprint == engines[1].fingerprint == expected_fingerprint(version)
    sync.close()


def test_an_engine_that_has_left_the_group_fails_one_update_by_name_and_joins_again_with_the_next(
    world: World, engines: list[LocalEngine], sync: WeightSync
) -> None:
    engines[1].subscriber.disconnect()
    with pytest.raises(UpdateFailedError) as caught:
        sync.update(publish_next(world), timeout_s=TIMEOUT_S)
    assert isinstance(caught.value.__cause__, NotConnectedError)
    version = publish_next(world)
    sync.update(version, timeout_s=TIMEOUT_S)
    assert engines[0].fingerprint == engines[1].fingerprint == expected_fingerprint(version)


def test_one_in_place_engine_that_tears_is_named_and_repaired_by_the_same_version(
    world: World, engines: list[LocalEngine]
) -> None:
    sync = connect(world, engines[:1], mode="inplace", transport=gated.NAME)
    version = publish_next(world)
    gated.gate.failure = SourceDiedError(1, "killed by the test")
    with pytest.raises(UpdateFailedError) as caught:
        sync.update(version, timeout_s=TIMEOUT_S)
    assert caught.value.phase == "commit"
    assert engines[0].subscriber.is_torn
    gated.reset()
    sync.update(version, timeout_s=TIMEOUT_S)
    assert not engines[0].subscriber.is_torn
    assert engines[0].fingerprint == expected_fingerprint(version)
    sync.close()


def test_a_late_joiner_gets_the_current_version_at_once_and_nobody_else_reconnects(
    sync: WeightSync, engines: list[LocalEngine], make_engine: Callable[[str], LocalEngine]
) -> None:
    before = [list(engine.calls) for engine in engines]
    late = make_engine("late")
    assert sync.add_member(late) == sync.version
    assert late.fingerprint == engines[0].fingerprint == expected_fingerprint(sync.version)
    assert [engine.calls for engine in engines] == before


def test_a_late_joiner_gets_what_the_others_serve_from_one_of_them_when_the_trainer_has_moved_on(
    world: World,
    sync: WeightSync,
    engines: list[LocalEngine],
    make_engine: Callable[[str], LocalEngine],
) -> None:
    served, version = sync.version, publish_next(world)
    late = make_engine("late")
    assert sync.add_member(late) == served
    assert late.fingerprint == engines[0].fingerprint == expected_fingerprint(served)
    sync.update(version, timeout_s=TIMEOUT_S)
    assert late.fingerprint == engines[0].fingerprint == expected_fingerprint(version)


def test_a_joiner_that_cannot_connect_is_no_member(
    world: World, sync: WeightSync, make_engine: Callable[[str], LocalEngine]
) -> None:
    late = make_engine("late")
    late.is_dead = True
    with pytest.raises(EngineUnreachableError):
        sync.add_member(late)
    assert "late" not in sync.engines
    late.is_dead = False
    sync.update(publish_next(world), timeout_s=TIMEOUT_S)
    assert "prepare" not in late.calls


def test_a_dead_engine_can_be_removed_and_the_others_go_on(
    world: World, sync: WeightSync, engines: list[LocalEngine]
) -> None:
    engines[1].is_dead = True
    sync.remove_engine("b")
    version = publish_next(world)
    assert [row.engine for row in sync.update(version, timeout_s=TIMEOUT_S).ranks] == ["a"]
    engines[1].is_dead = False
    with pytest.raises(ConfigError):
        sync.remove_engine("b")


def test_an_engine_cannot_join_twice(sync: WeightSync, engines: list[LocalEngine]) -> None:
    with pytest.raises(ConfigError, match="member already"):
        sync.add_member(engines[0])


def test_a_new_driver_finds_out_which_version_the_engines_serve(
    world: World, sync: WeightSync, engines: list[LocalEngine]
) -> None:
    successor = connect(world, engines)
    assert successor.version == sync.version
    with pytest.raises(StaleVersionError):
        successor.update(sync.version, timeout_s=TIMEOUT_S)
    version = publish_next(world)
    successor.update(version, timeout_s=TIMEOUT_S)
    assert engines[0].fingerprint == expected_fingerprint(version)


def test_a_second_call_while_one_runs_is_refused(world: World, engines: list[LocalEngine]) -> None:
    sync = connect(world, engines, transport=gated.NAME)
    version = publish_next(world)
    gated.gate.close()
    first = threading.Thread(target=sync.update, args=(version,))
    first.start()
    gated.gate.wait_until_reached()
    with pytest.raises(BusyError):
        sync.update(version)
    with pytest.raises(BusyError):
        sync.remove_engine("a")
    gated.gate.opened.set()
    first.join(TIMEOUT_S)
    assert sync.version == version
    sync.close()
    sync.close()
    with pytest.raises(ClosedError):
        sync.update(version + 1)


@pytest.mark.parametrize("mode", ["staged", "inplace"])
def test_an_update_may_be_asked_for_before_the_trainers_publish(
    world: World, engines: list[LocalEngine], mode: str
) -> None:
    sync = connect(world, engines, mode=mode)
    version = world.trainers[0].publisher.version + 1
    update = threading.Thread(target=sync.update, args=(version,), kwargs={"timeout_s": TIMEOUT_S})
    update.start()
    wait_for(lambda: all(engine.subscriber._is_awaiting for engine in engines))
    assert not any(engine.subscriber.is_reading for engine in engines)
    assert {engine.subscriber.status()["state"] for engine in engines} == {"reading"}
    world.publish(version)
    update.join(TIMEOUT_S)
    assert [engine.calls.count("prepare") for engine in engines] == [1, 1]
    assert [engine.fingerprint for engine in engines] == [expected_fingerprint(version)] * 2
    sync.close()


def test_engines_that_waited_in_vain_forget_the_version_and_are_free_for_the_next(
    world: World, sync: WeightSync, engines: list[LocalEngine]
) -> None:
    never = world.trainers[0].publisher.version + 1
    with pytest.raises(NotPublishedError):
        sync.update(never, timeout_s=0.5)
    assert {engine.subscriber.status()["state"] for engine in engines} == {"idle"}
    world.publish(never + 1)
    with pytest.raises(SupersededError):
        sync.update(never, timeout_s=TIMEOUT_S)
    sync.update(never + 1, timeout_s=TIMEOUT_S)
    assert [engine.fingerprint for engine in engines] == [expected_fingerprint(never + 1)] * 2


def test_an_engine_that_cannot_wait_is_asked_once_the_version_is_published(
    world: World, engines: list[LocalEngine]
) -> None:
    sync = connect(world, engines)
    for member in sync._members.values():
        # What an engine of an earlier release answers to connect.
        member.ranks = [{k: v for k, v in rank.items() if k != "awaits_publication"} for rank in member.ranks]
    with pytest.raises(NotPublishedError):
        sync.update(world.trainers[0].publisher.version + 1, timeout_s=0.2)
    assert not any("prepare" in engine.calls for engine in engines)
    sync.update(publish_next(world), timeout_s=TIMEOUT_S)
    sync.close()


@pytest.mark.parametrize(
    "asked", [{"mode": "disk"}, {"verify": "md5"}, {"kv_cache": "x"}, {"commit_policy": "some"}]
)
def test_an_option_that_does_not_exist_is_refused_before_anything_happens(
    world: World, sync: WeightSync, engines: list[LocalEngine], asked: dict[str, str]
) -> None:
    before = list(engines[0].calls)
    with pytest.raises(ConfigError, match=next(iter(asked))):
        sync.update(publish_next(world), **asked)  # type: ignore[arg-type]  # each value is a wrong one
    assert engines[0].calls == before


def test_a_coordinator_that_is_restarted_in_mid_read_costs_an_update_one_more_read(
    world: World, engines: list[LocalEngine]
) -> None:
    sync = connect(world, engines, transport=gated.NAME)
    version = publish_next(world)
    gated.gate.close()
    update = threading.Thread(target=sync.update, args=(version,), kwargs={"timeout_s": TIMEOUT_S})
    update.start()
    gated.gate.wait_until_reached()
    world.channel.restart()
    gated.gate.opened.set()
    update.join(TIMEOUT_S)
    assert not update.is_alive()
    assert [engine.fingerprint for engine in engines] == [expected_fingerprint(version)] * 2
    sync.close()


@pytest.mark.parametrize("counts_on", [True, False])
def test_a_driver_that_outlives_trainers_and_coordinator_brings_their_successors_versions_to_all(
    lost_world: World, clock: Clock, *, counts_on: bool
) -> None:
    engines = [LocalEngine(lost_world.channel, name) for name in ("a", "b")]
    sync = connect(lost_world, engines)
    lost_world.publish(7)
    sync.update(7, timeout_s=TIMEOUT_S)
    lost_world.publish(8)
    engines[1].is_dead = True
    # It leaves the first at a version that the successors give as well, to other bytes.
    assert len(sync.update(8, commit_policy="engine", timeout_s=TIMEOUT_S).failures) == 1
    engines[1].is_dead = False
    new = count_anew(lost_world, clock)
    version = 8 if counts_on else 1
    for rank in new.trainers:
        rank.write(100)
        rank.publisher.publish(version)
    engines[0].is_dead = True
    with pytest.raises(EngineUnreachableError):
        sync.update(version, timeout_s=TIMEOUT_S)
    engines[0].is_dead = False
    report = sync.update(version, timeout_s=TIMEOUT_S)
    assert sorted(row.engine for row in report.ranks) == ["a", "b"]
    assert [engine.fingerprint for engine in engines] == [expected_fingerprint(100)] * 2
    with pytest.raises(StaleVersionError):
        sync.update(version, timeout_s=TIMEOUT_S)
    sync.close()
    for engine in engines:
        engine.stop()
    new.close()


def test_a_connect_that_is_given_up_leaves_no_engine_in_the_group(
    world: World, engines: list[LocalEngine]
) -> None:
    hold = threading.Event()
    engines[1]._model_thread.submit(hold.wait, TIMEOUT_S)
    asked = {"group": GROUP, "transport": "memory", "mode": "staged", "timeout_s": 0.1}
    sync = WeightSync(world.client, engines, asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rdt_core.member.CONNECT_MARGIN_S", 0.0)
        patch.setattr("rdt_core.sync._TRAINERS_TIMEOUT_S", 0.1)
        with pytest.raises(EngineUnreachableError):
            sync.join_all()
        # The engine is still to connect when the driver leaves.
        sync.close()
    hold.set()
    assert engines[1]._model_thread.submit(engines[1].subscriber.status).result(TIMEOUT_S)["group"] is None
    assert world.client.status()["engines"] == []


def test_a_driver_that_leaves_one_group_does_not_part_an_engine_from_another(
    world: World, engines: list[LocalEngine]
) -> None:
    with connect(world, engines) as sync:
        engines[0].call("disconnect", {"group": "of another driver"}, timeout_s=TIMEOUT_S)
        version = publish_next(world)
        sync.update(version, timeout_s=TIMEOUT_S)
    assert engines[0].fingerprint == expected_fingerprint(version)
