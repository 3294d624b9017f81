"""What the coordinator promises its callers, in this process and as a real Ray actor."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import ray

from rdt_core.client import CoordinatorClient, LocalChannel, RayChannel
from rdt_core.coordinator import POLL_S
from rdt_core.errors import (
    ConfigError,
    CoordinatorLostError,
    ForgottenError,
    GroupInUseError,
    LeaseLostError,
    MissingTrainerRankError,
    NotPublishedError,
    RdtError,
    ReleasedError,
    StaleVersionError,
    SupersededError,
    TopologyChangedError,
    UnknownGroupError,
)
from rdt_core.peers import GroupCoordinator
from rdt_core.roster import SILENT_S
from rdt_core.words import LastWords, Outcome
from tests.contract.world import Clock
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator


class SharedActor:
    """A coordinator's actor for many tests, since each takes seconds to import torch."""

    def __init__(self) -> None:
        self._channel: RayChannel | None = None

    def begin_anew(self) -> RayChannel:
        """The actor, which has forgotten all that it was told; another one where a test has ended it."""
        if self._channel is not None:
            anew = self._channel._actor.__ray_call__.remote(
                lambda held: GroupCoordinator.__init__(held, "policy")
            )
            with contextlib.suppress(ray.exceptions.RayActorError):
                ray.get(anew, timeout=60.0)
                return self._channel
        self._channel = RayChannel.create(f"policy-{uuid.uuid4().hex}")
        # Until it answers, which takes a busy machine longer than a call may.
        self._channel.call("session", timeout_s=120.0)
        return self._channel

    def end(self) -> None:
        if self._channel is not None:
            self._channel.end()


@pytest.fixture(scope="module")
def shared_actor(ray_cluster: str) -> Iterator[SharedActor]:
    assert ray_cluster
    actor = SharedActor()
    yield actor
    actor.end()


@pytest.fixture(params=["local", "ray"])
def client(request: pytest.FixtureRequest, clock: Clock) -> Iterator[CoordinatorClient]:
    """A fresh group's coordinator."""
    if request.param == "local":
        channel = LocalChannel("policy", clock)
        yield CoordinatorClient(channel)
        channel.end()
    else:
        yield CoordinatorClient(request.getfixturevalue("shared_actor").begin_anew())


class Rank:
    """A trainer rank that fetches tasks and answers them with a function of its payload."""

    def __init__(self, client: CoordinatorClient, rank: int, world_size: int) -> None:
        self.client, self.rank, self.instance = client, rank, uuid.uuid4().hex
        client.attach(rank, world_size, self.instance, f"manifest {rank}".encode())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            for task in self.client.next_tasks(self.rank, self.instance):
                refused = task.payload == "refuse"
                error = StaleVersionError(1, 2, "in a test") if refused else None
                self.client.answer(task.number, Outcome((self.rank, task.kind, task.payload), error))

    def stop(self) -> None:
        self._stop.set()
        with contextlib.suppress(RdtError):
            self.client.end_tasks(self.rank, self.instance)
        self._thread.join(20)


@pytest.fixture
def ranks(client: CoordinatorClient) -> Iterator[list[Rank]]:
    """Two trainer ranks that answer tasks."""
    made = [Rank(client, rank, 2) for rank in range(2)]
    yield made
    for rank in made:
        rank.stop()


def test_manifests_come_in_rank_order_once_every_rank_attached(client: CoordinatorClient) -> None:
    client.attach(1, 2, "b", b"one")
    client.attach(0, 2, "a", b"zero")
    assert client.manifests(5.0) == [b"zero", b"one"]


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_a_group_of_its_size_does_not_have_is_refused(
    client: CoordinatorClient, rank: int
) -> None:
    with pytest.raises(ConfigError, match=f"trainer rank {rank} is none of a group of 2"):
        client.attach(rank, 2, "x", b"")


def test_a_missing_trainer_rank_is_named_in_the_error(client: CoordinatorClient) -> None:
    client.attach(1, 3, "b", b"one")
    with pytest.raises(MissingTrainerRankError) as caught:
        client.manifests(0.2)
    assert caught.value.missing == (0, 2)


def test_a_live_rank_cannot_be_attached_twice(client: CoordinatorClient, ranks: list[Rank]) -> None:
    started = time.monotonic()
    with pytest.raises(GroupInUseError):
        client.attach(0, 2, "another process", b"x")
    assert time.monotonic() - started < SILENT_S
    assert client.manifests(1.0)[0] == b"manifest 0"
    ranks[0].client.publish(0, ranks[0].instance, 1)


def test_a_rank_that_fell_silent_is_replaced_and_its_versions_go_on(
    client: CoordinatorClient, clock: Clock
) -> None:
    client.attach(0, 1, "dead process", b"old")
    client.publish(0, "dead process", 7)
    clock.skip(2 * SILENT_S)
    assert client.attach(0, 1, "new process", b"new") == 7
    assert client.manifests(1.0) == [b"new"]
    with pytest.raises(GroupInUseError):
        client.publish(0, "dead process", 8)


def test_a_rank_whose_earlier_process_leaves_is_replaced_at_once(client: CoordinatorClient) -> None:
    client.attach(0, 2, "leaves", b"old")
    client.attach(1, 2, "stays", b"other")
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        comes = pool.submit(client.attach, 0, 2, "comes", b"new")
        client.detach(0, "leaves")
        assert comes.result(20) == 0
    assert time.monotonic() - started < SILENT_S
    assert client.manifests(1.0) == [b"new", b"other"]


def test_another_world_size_is_refused_while_others_are_alive(
    client: CoordinatorClient, ranks: list[Rank]
) -> None:
    assert len(ranks) == 2
    with pytest.raises(ConfigError, match="world size"):
        client.attach(2, 3, "b", b"")


def test_versions_only_grow(client: CoordinatorClient) -> None:
    client.attach(0, 1, "a", b"")
    with pytest.raises(StaleVersionError):
        client.publish(0, "a", 0)
    client.publish(0, "a", 5)
    for version in (5, 4, 0):
        with pytest.raises(StaleVersionError):
            client.publish(0, "a", version)


def test_a_version_is_readable_only_while_every_rank_holds_it(client: CoordinatorClient) -> None:
    client.attach(0, 2, "a", b"")
    client.attach(1, 2, "b", b"")
    client.publish(0, "a", 1)
    with pytest.raises(NotPublishedError) as caught:
        client.wait_published(1, 0.2)
    assert caught.value.missing == (1,)
    assert not client.await_published(1, 0.0)
    client.publish(1, "b", 1)
    client.wait_published(1, 5.0)
    client.check_version(1)
    assert client.await_published(1, 0.0)
    client.publish(0, "a", 2)
    with pytest.raises(SupersededError):
        client.check_version(1)


def test_a_writer_waits_for_leases_and_nobody_takes_new_ones(client: CoordinatorClient) -> None:
    client.attach(0, 1, "a", b"")
    client.publish(0, "a", 1)
    client.join("http://a", 0, {})
    lease = client.begin_read("http://a", 0, 1, "", 60.0)
    cut_off: list[object] = []
    writer = threading.Thread(target=lambda: cut_off.extend(client.release(0, "a", 60.0)))
    writer.start()
    wait_for(lambda: client.status()["trainers"][0]["writing"])
    with pytest.raises(ReleasedError):
        client.begin_read("http://a", 0, 1, "", 60.0)
    assert writer.is_alive()
    client.end_read(lease, 1)
    writer.join(30)
    assert not writer.is_alive()
    assert cut_off == []


def test_readers_that_wait_have_their_leases_before_a_writer_can_take_the_version_back(
    client: CoordinatorClient,
) -> None:
    client.attach(0, 1, "a", b"")
    for rank in range(2):
        client.join("http://a", rank, {})
    assert client.start_read("http://a", 0, 1, "", 60.0, 0.01)() == 0
    assert client.check_version(1, "", 0.01) == ""
    waits = [client.start_read("http://a", rank, 1, "", 60.0, 30.0) for rank in range(2)]
    client.publish(0, "a", 1)
    writer = threading.Thread(target=client.release, args=(0, "a", 60.0))
    writer.start()
    leases = [wait() for wait in waits]
    assert all(leases)
    for lease in leases:
        assert writer.is_alive()
        client.end_read(lease, 1)
    writer.join(30)
    assert not writer.is_alive()


def test_a_writer_that_waited_long_enough_revokes_the_leases_and_names_their_readers(
    client: CoordinatorClient,
) -> None:
    client.attach(0, 1, "a", b"")
    client.publish(0, "a", 1)
    client.join("http://a", 3, {})
    lease = client.begin_read("http://a", 3, 1, "", 60.0)
    assert client.release(0, "a", 0.1) == [("http://a", 3)]
    with pytest.raises(ReleasedError):
        client.end_read(lease, 1)
    client.publish(0, "a", 2)
    with pytest.raises(SupersededError):
        client.end_read(lease, 1)


def test_a_lease_ends_at_its_deadline_whatever_its_reader_does(client: CoordinatorClient) -> None:
    client.attach(0, 1, "a", b"")
    client.publish(0, "a", 1)
    client.join("http://a", 0, {})
    lease = client.begin_read("http://a", 0, 1, "", 0.1)
    wait_for(lambda: client.status()["leases"] == [])
    with pytest.raises(LeaseLostError):
        client.end_read(lease, 1)
    assert client.release(0, "a", 0.0) == []


def test_a_rank_that_was_replaced_does_not_hold_what_the_dead_one_published(
    client: CoordinatorClient, clock: Clock
) -> None:
    client.attach(0, 1, "dead process", b"old")
    client.publish(0, "dead process", 7)
    clock.skip(2 * SILENT_S)
    client.attach(0, 1, "new process", b"new")
    with pytest.raises(ReleasedError):
        client.check_version(7)
    client.publish(0, "new process", 8)
    client.check_version(8)


def test_a_rank_that_is_about_to_leave_does_not_wait_for_its_poll(client: CoordinatorClient) -> None:
    client.attach(0, 1, "a", b"")
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(client.next_tasks, 0, "a")
        client.end_tasks(0, "a")
        assert poll.result(POLL_S / 2) == []
    assert client.next_tasks(0, "a") == []
    with pytest.raises(GroupInUseError):
        client.end_tasks(0, "another process")


def test_a_task_is_answered_by_the_rank_it_was_given_to(client: CoordinatorClient, ranks: list[Rank]) -> None:
    assert len(ranks) == 2
    answers = client.ask("echo", {0: "x", 1: ["y", 2]}, 10.0)
    assert answers == {0: (0, "echo", "x"), 1: (1, "echo", ["y", 2])}


def test_an_error_in_a_task_reaches_the_asker_with_its_type(
    client: CoordinatorClient, ranks: list[Rank]
) -> None:
    assert len(ranks) == 2
    with pytest.raises(StaleVersionError):
        client.ask("echo", {0: "x", 1: "refuse"}, 10.0)


def test_a_task_for_a_rank_that_is_not_there_fails_at_once(
    client: CoordinatorClient, ranks: list[Rank]
) -> None:
    assert len(ranks) == 2
    with pytest.raises(MissingTrainerRankError) as caught:
        client.ask("echo", {5: "x"}, 10.0)
    assert caught.value.waited_s < SILENT_S / 2


def test_a_task_for_a_rank_that_falls_silent_ends_with_its_name(
    client: CoordinatorClient, clock: Clock
) -> None:
    client.attach(0, 1, "says nothing more", b"")
    clock.skip(0.9 * SILENT_S)
    with pytest.raises(MissingTrainerRankError) as caught:
        client.ask("echo", {0: "x"}, 2 * SILENT_S)
    assert caught.value.missing == (0,)


def life_of(client: CoordinatorClient) -> str:
    """What a driver holds on to while a sync runs."""
    client.attach(0, 1, "a", b"")
    client.publish(0, "a", 1)
    return client.wait_published(1, 5.0)[0]


def test_outcomes_that_an_earlier_coordinator_got_are_not_waited_for(client: CoordinatorClient) -> None:
    with pytest.raises(CoordinatorLostError, match="restarted"):
        client.wait_prepared("1:x", [("http://a", 0)], "an earlier life", 60.0)


def test_a_read_by_an_engine_that_never_joined_is_refused(client: CoordinatorClient) -> None:
    life_of(client)
    with pytest.raises(ForgottenError, match="http://a"):
        client.begin_read("http://a", 0, 1, "", 60.0)


def test_a_read_planned_for_other_trainer_processes_is_refused(client: CoordinatorClient) -> None:
    life_of(client)
    client.join("http://a", 0, {})
    with pytest.raises(TopologyChangedError):
        client.begin_read("http://a", 0, 1, "0:another process", 60.0)
    lease = client.begin_read("http://a", 0, 1, client.topology(), 60.0)
    client.end_read(lease, 1)


def test_a_rank_tells_its_version_with_every_sign_of_life(client: CoordinatorClient) -> None:
    client.attach(0, 1, "a", b"")
    client.next_tasks(0, "a", 5)
    client.wait_published(5, 0.0)
    assert client.release(0, "a", 0.0) == []
    client.next_tasks(0, "a", 5)
    with pytest.raises(ReleasedError):
        client.check_version(5)


def test_a_sign_of_life_may_overtake_the_publish_that_it_tells_of(client: CoordinatorClient) -> None:
    client.attach(0, 1, "a", b"")
    client.next_tasks(0, "a", 5)
    client.publish(0, "a", 5, 7)
    assert client.status()["trainers"][0]["arena_bytes"] == 7
    with pytest.raises(StaleVersionError):
        client.publish(0, "a", 5)


def test_an_introduction_may_overtake_the_publish_that_it_tells_of(client: CoordinatorClient) -> None:
    client.attach(0, 1, "a", b"", LastWords("the session before", 5, is_writing=False))
    client.publish(0, "a", 5)
    client.check_version(5)
    with pytest.raises(StaleVersionError):
        client.publish(0, "a", 5)


def test_other_ranks_than_before_take_over_once_the_old_ones_are_silent() -> None:
    clock = Clock()
    channel = LocalChannel("policy", clock)
    client = CoordinatorClient(channel)
    for rank in range(2):
        client.attach(rank, 2, f"old {rank}", b"old")
        client.publish(rank, f"old {rank}", 7)
    clock.skip(2 * SILENT_S)
    assert client.attach(0, 1, "new", b"new") == 7
    assert client.manifests(1.0) == [b"new"]
    with pytest.raises(ForgottenError):
        client.publish(1, "old 1", 8)
    channel.end()


def test_the_end_of_a_poll_is_no_sign_of_life() -> None:
    clock = Clock()
    channel = LocalChannel("policy", clock)
    client = CoordinatorClient(channel)
    client.attach(0, 1, "a", b"manifest")
    clock.skip(SILENT_S / 2)
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(client.next_tasks, 0, "a")
        wait_for(lambda: client.status()["trainers"][0]["silent_s"] < SILENT_S / 2)
        clock.skip(2 * SILENT_S)
        assert poll.result(30) == []
    assert not client.status()["trainers"][0]["alive"]
    channel.end()


def test_the_end_of_a_writers_wait_for_readers_is_no_sign_of_life() -> None:
    clock = Clock()
    channel = LocalChannel("policy", clock)
    client = CoordinatorClient(channel)
    client.attach(0, 1, "a", b"manifest")
    client.publish(0, "a", 1)
    client.join("http://a", 0, {})
    client.begin_read("http://a", 0, 1, "", 10 * SILENT_S)
    clock.skip(SILENT_S / 2)
    with ThreadPoolExecutor(1) as pool:
        release = pool.submit(client.release, 0, "a", SILENT_S)
        wait_for(lambda: client.status()["trainers"][0]["silent_s"] < SILENT_S / 2)
        clock.skip(2 * SILENT_S)
        assert release.result(30) == [("http://a", 0)]
    assert not client.status()["trainers"][0]["alive"]
    channel.end()


def test_prepared_ranks_are_awaited_by_attempt(client: CoordinatorClient) -> None:
    members, life = [("http://a", 0), ("http://a", 1)], life_of(client)
    client.report_prepared("http://a", 0, "old attempt", Outcome(error=RdtError("of an earlier try")))
    client.report_prepared("http://a", 0, "1:x", Outcome(10))
    assert set(client.wait_prepared("1:x", members, life, 0.2)) == {members[0]}
    client.report_prepared("http://a", 1, "1:x", Outcome(11))
    assert {m: o.value for m, o in client.wait_prepared("1:x", members, life, 5.0).items()} == {
        members[0]: 10,
        members[1]: 11,
    }


def test_one_failed_rank_ends_the_wait_for_the_others(client: CoordinatorClient) -> None:
    client.report_prepared("http://a", 1, "1:x", Outcome(error=SupersededError(1, 2)))
    outcomes = client.wait_prepared("1:x", [("http://a", 0), ("http://a", 1)], life_of(client), 30.0)
    assert isinstance(outcomes["http://a", 1].error, SupersededError)


def test_status_tells_who_is_there_and_what_they_hold(client: CoordinatorClient) -> None:
    client.attach(0, 1, "a", b"")
    client.publish(0, "a", 3)
    client.join("http://a", 0, {"nbytes": 5})
    status = client.status()
    assert status["trainers"][0]["version"] == 3
    assert status["engines"] == [{"engine": "http://a", "rank": 0, "nbytes": 5}]
    client.leave("http://a", 0)
    assert client.status()["engines"] == []


def test_the_last_trainer_that_leaves_ends_the_coordinator(client: CoordinatorClient) -> None:
    client.attach(0, 1, "a", b"")
    client.detach(0, "a")
    with pytest.raises(CoordinatorLostError):
        client.status()


@pytest.mark.parametrize("life", range(3))
def test_a_trainer_that_attaches_right_after_the_last_one_left_gets_a_coordinator_of_its_own(
    ray_cluster: str, life: int
) -> None:
    assert ray_cluster
    client = CoordinatorClient(RayChannel.create("again"))
    assert client.attach(0, 1, f"life {life}", b"") == 0
    client.publish(0, f"life {life}", 1 + life)
    client.detach(0, f"life {life}")


def test_an_unknown_group_is_refused_by_name(ray_cluster: str) -> None:
    assert ray_cluster
    with pytest.raises(UnknownGroupError, match="no-such-group"):
        RayChannel.find("no-such-group")


def test_the_arenas_of_all_ranks_are_counted_once_a_version_is_published(client: CoordinatorClient) -> None:
    for rank in range(2):
        client.attach(rank, 2, "a", b"")
        client.publish(rank, "a", 1, 64)
    assert client.wait_published(1, 1.0)[1] == 128
    assert client.status()["trainers"][1]["arena_bytes"] == 64
