"""A group that has lost its coordinator, and maybe all trainers with it: what its numbers mean after that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from rdt_core.client import CoordinatorClient, LocalChannel
from rdt_core.errors import CannotLendError
from rdt_core.lifecycle import Held, RankLife
from rdt_core.wholeness import are_whole
from rdt_core.words import LastWords, Outcome
from tests.contract.world import Clock, Engine, World, count_anew, expected_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdt_core.words import TrainerTask


def test_a_number_that_a_lost_coordinator_gave_means_nothing_to_the_next(clock: Clock) -> None:
    channel = LocalChannel("policy", clock)
    client = CoordinatorClient(channel)

    def ask_and_lease(reader: str) -> tuple[Callable[[float], Any], TrainerTask, int]:
        client.join(reader, 0, {})
        lease = client.begin_read(reader, 0, 1, client.topology(), 60.0)
        asked = channel.start("ask", "export", {0: reader}, 60.0)
        (task,) = client.next_tasks(0, "a", 1)
        return asked, task, lease

    client.attach(0, 1, "a", b"")
    client.publish(0, "a", 1)
    _, lost_task, lost_lease = ask_and_lease("http://a")
    channel.restart()
    client.attach(0, 1, "a", b"", LastWords("the session before", 1, is_writing=False))
    asked, task, lease = ask_and_lease("http://b")
    # What the rank had been asked for by one reader must not be taken for what another one asks.
    client.answer(lost_task.number, Outcome("for a"))
    client.answer(task.number, Outcome("for b"))
    assert asked(60.0) == {0: "for b"}
    client.drop_lease(lost_lease)
    client.end_read(lease, 1)
    channel.end()


def test_a_group_that_counts_anew_leaves_an_engine_the_version_that_it_holds(
    lost_world: World, clock: Clock
) -> None:
    engine = Engine(lost_world.channel)
    engine.connect(transport="memory")
    lost_world.publish(7)
    engine.subscriber.prepare(7)
    engine.subscriber.commit(7)
    new = count_anew(lost_world, clock)
    joined = engine.connect(transport="memory")
    assert joined["version"] == 0
    assert engine.subscriber.version == engine.subscriber.status()["version"] == 7
    assert engine.fingerprint == expected_fingerprint(7)
    with pytest.raises(CannotLendError):
        engine.subscriber.lend(7)
    new.publish(3)
    engine.subscriber.prepare(3)
    assert engine.subscriber.version == 7
    engine.subscriber.commit(3)
    assert engine.subscriber.version == engine.subscriber.status()["version"] == 3
    assert engine.fingerprint == expected_fingerprint(3)
    engine.subscriber.disconnect()
    new.close()


def test_a_rank_that_followed_its_trainers_into_another_session_holds_nothing_of_it_yet() -> None:
    life = RankLife()
    life.connect("first")
    life.end_read(life.begin_read(7), 7)
    life.begin_flip(7)
    life.begin_write()
    life.end_flip()
    failed = life.begin_read(8)
    life.follow("second")
    life.fail_read(failed)
    life.disconnect()
    life.connect("second")
    assert (life.committed, life.held) == (0, Held(7, "first"))
    assert life.check_at_rest(7) is not None
    life.begin_read(3)


@pytest.mark.parametrize("reconnects", [True, False])
def test_a_number_that_two_sessions_gave_is_not_one_version(
    lost_world: World, clock: Clock, *, reconnects: bool
) -> None:
    ranks = [Engine(lost_world.channel, f"http://{name}") for name in "ab"]
    for number, rank in zip((6, 7), ranks, strict=True):
        rank.connect(transport="memory")
        lost_world.publish(number)
        rank.subscriber.prepare(number)
        rank.subscriber.commit(number)
    new = count_anew(lost_world, clock)
    one, other = ranks
    if reconnects:
        one.connect(transport="memory")
    new.publish(7)
    one.subscriber.prepare(7)
    one.subscriber.commit(7)
    states = [rank.subscriber.status() for rank in ranks]
    assert [state["version"] for state in states] == [7, 7]
    assert not are_whole(states)
    if reconnects:
        other.connect(transport="memory")
        other.subscriber.prepare(7)
        other.subscriber.commit(7)
        assert are_whole([rank.subscriber.status() for rank in ranks])
    for rank in ranks:
        rank.subscriber.disconnect()
    new.close()
