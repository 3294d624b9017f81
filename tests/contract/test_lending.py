"""An engine that joins while the trainers write, or are gone, reads from another engine: the same bytes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch

from rdt_core import WeightSync, transports
from rdt_core.client import LocalChannel
from rdt_core.errors import CannotLendError, RdtError, SourceDiedError, UpdateFailedError
from rdt_core.roster import SILENT_S
from rdt_core.welcome import find_sources
from tests.contract import gated
from tests.contract.local_engine import LocalEngine
from tests.contract.world import GROUP, Clock, TrainerRank, World, expected_fingerprint
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rdt_core.report import SyncFailure, SyncReport

TIMEOUT_S = 60.0


class Reports:
    """Keeps what a driver reports; see :class:`rdt_core.observer.SyncObserver`."""

    def __init__(self) -> None:
        self.synced: list[SyncReport] = []

    def on_connected(self, group: str, engines: Mapping[str, Sequence[Mapping[str, object]]]) -> None:
        """Not kept."""

    def on_synced(self, group: str, report: SyncReport) -> None:
        self.synced.append(report)

    def on_failed(self, group: str, failure: SyncFailure) -> None:
        """Not kept."""

    def on_closed(self, group: str) -> None:
        """Not kept."""


class Group:
    """A driver and engines over the gated transport."""

    def __init__(self, world: World) -> None:
        self.world, self.reports = world, Reports()
        self.made: list[LocalEngine] = []
        self.first = self.make_engine("first")
        asked = {"group": GROUP, "transport": gated.NAME, "mode": "staged", "timeout_s": TIMEOUT_S}
        self.sync = WeightSync(world.client, [self.first], asked, observers=[self.reports])
        self.sync.join_all()

    def make_engine(self, name: str) -> LocalEngine:
        self.made.append(LocalEngine(self.world.channel, name))
        return self.made[-1]

    def update(self) -> int:
        """The next version, in every member."""
        version = self.world.trainers[0].publisher.version + 1
        self.world.publish(version)
        self.sync.update(version, timeout_s=TIMEOUT_S)
        return version

    def release(self) -> None:
        """The trainers begin to write."""
        for rank in self.world.trainers:
            rank.publisher.release()
            rank.write(1_000_000)

    def close(self) -> None:
        gated.reset()
        for engine in self.made:
            engine.is_dead = False
        self.sync.close()
        for engine in self.made:
            engine.stop()


@pytest.fixture
def group(world: World) -> Iterator[Group]:
    made = Group(world)
    yield made
    made.close()


def in_mid_read_of(engine: LocalEngine, act: Callable[[], None]) -> None:
    """Have ``act`` run once, in the middle of this engine's next read; a probe at connect is none."""

    def reach() -> None:
        if engine.subscriber.is_reading:
            gated.gate.on_reach = None
            act()

    gated.gate.on_reach = reach


def wait_until_nobody_lends(world: World) -> None:
    wait_for(lambda: world.client.status()["lending"] == [])


def test_a_newcomer_reads_from_an_engine_while_the_trainers_write_and_then_from_the_trainers(
    world: World, group: Group
) -> None:
    version = group.update()
    group.release()
    late = group.make_engine("late")
    assert group.sync.add_member(late) == version
    assert late.fingerprint == group.first.fingerprint == expected_fingerprint(version)
    report = group.reports.synced[-1]
    assert (report.version, report.source) == (version, "first")
    assert [(row.engine, row.source) for row in report.ranks] == [("late", "first")]
    assert sum(link.nbytes for row in report.ranks for link in row.links) > 0
    wait_until_nobody_lends(world)
    following = group.update()
    assert late.fingerprint == group.first.fingerprint == expected_fingerprint(following)
    assert group.reports.synced[-1].source == "trainers"
    rows = {row["engine"]: row["source"] for row in world.client.status()["engines"]}
    assert rows == {"first": "trainers", "late": "trainers"}


def test_a_newcomer_that_holds_no_less_than_the_others_is_not_read_for_and_takes_the_next_version(
    world: World, group: Group
) -> None:
    version = group.update()
    late = group.make_engine("late")
    group.sync.add_member(late)
    group.sync.remove_engine("late")
    group.release()
    assert group.sync.add_member(late) == version
    following = group.update()
    assert late.fingerprint == expected_fingerprint(following)
    wait_until_nobody_lends(world)


def test_an_engine_that_prepares_the_next_version_first_waits_for_who_reads_what_it_lent(
    world: World, group: Group
) -> None:
    version = group.update()
    group.release()
    late = group.make_engine("late")
    is_in_mid_read, may_go_on = threading.Event(), threading.Event()

    def wait_in_mid_read() -> None:
        is_in_mid_read.set()
        assert may_go_on.wait(TIMEOUT_S)

    in_mid_read_of(late, wait_in_mid_read)
    joining = threading.Thread(target=group.sync.add_member, args=(late,))
    joining.start()
    assert is_in_mid_read.wait(TIMEOUT_S)
    # Another driver brings the lender to the next version.
    world.publish(world.trainers[0].publisher.version + 1)
    following = world.trainers[0].publisher.version
    preparing = threading.Thread(target=group.first.subscriber.prepare, args=(following,))
    preparing.start()
    client = world.client.of_lender("first")
    wait_for(lambda: not _can_read(client, version))
    assert group.first.subscriber.status()["state"] == "reading"
    may_go_on.set()
    joining.join(TIMEOUT_S)
    preparing.join(TIMEOUT_S)
    assert late.fingerprint == expected_fingerprint(version)
    group.first.subscriber.commit(following)
    assert group.first.fingerprint == expected_fingerprint(following)
    assert late.fingerprint == expected_fingerprint(version)


def _can_read(client: object, version: int) -> bool:
    try:
        client.check_version(version)  # type: ignore[attr-defined]  # a coordinator's client
    except RdtError:
        return False
    return True


def test_a_commit_in_mid_read_makes_the_read_fail_by_name_and_never_mixes_two_versions(
    world: World, group: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rdt_core.subscriber.GRACE_S", 0.0)
    version = group.update()
    group.release()
    late = group.make_engine("late")
    before = late.fingerprint

    def commit_in_mid_read() -> None:
        world.publish(world.trainers[0].publisher.version + 1)
        following = world.trainers[0].publisher.version
        group.first.subscriber.prepare(following)
        group.first.subscriber.commit(following)

    in_mid_read_of(late, commit_in_mid_read)
    # The read from the engine fails; it joins by way of the trainers then, and waits for the next version.
    with caplog.at_level("INFO", logger="rdt_core.welcome"):
        assert group.sync.add_member(late) == 0
    assert "by way of engine first" in caplog.text
    assert "lease" in caplog.text or "released" in caplog.text
    assert late.subscriber.version == 0
    assert late.fingerprint == before
    following = group.update()
    assert late.fingerprint == group.first.fingerprint == expected_fingerprint(following)
    assert following > version


def test_an_engine_that_dies_while_it_is_read_is_passed_over_for_the_next_one(
    world: World, group: Group
) -> None:
    second = group.make_engine("second")
    group.sync.add_member(second)
    version = group.update()
    group.release()
    late = group.make_engine("late")

    def die_in_mid_read() -> None:
        group.first.is_dead = True
        raise SourceDiedError(0, "killed by the test")

    in_mid_read_of(late, die_in_mid_read)
    assert group.sync.add_member(late) == version
    assert late.fingerprint == expected_fingerprint(version)
    assert group.reports.synced[-1].source == "second"


def test_a_newcomer_gets_the_version_of_trainers_that_are_gone_and_later_reads_their_successors() -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(transports._FACTORIES, gated.NAME, "tests.contract.gated:GatedTransport")
        gated.reset()
        channel = LocalChannel(GROUP, clock)
        world = World(channel, [TrainerRank(channel, rank, 2) for rank in range(2)])
        group = Group(world)
        version = group.update()
        for rank in world.trainers:
            rank.publisher._is_closed.set()
        clock.skip(2 * SILENT_S)
        world.client.leave("nobody", 0)
        for rank in world.trainers:
            rank.die()
        late = group.make_engine("late")
        assert group.sync.add_member(late) == version
        assert late.fingerprint == expected_fingerprint(version)
        assert group.reports.synced[-1].source == "first"
        world.trainers[:] = [TrainerRank(channel, 0, 1)]
        following = group.update()
        assert following > version
        assert late.fingerprint == group.first.fingerprint == expected_fingerprint(following)
        group.close()
        world.close()


@pytest.mark.parametrize("fault", ["another version", "prepared", "torn"])
def test_an_engine_lends_only_what_it_holds_whole_and_at_rest(world: World, group: Group, fault: str) -> None:
    version = group.update()
    if fault == "prepared":
        world.publish(version + 1)
        group.first.subscriber.prepare(version + 1)
    if fault == "torn":
        group.first.connect(mode="inplace")
        world.publish(version + 1)
        group.first.subscriber.prepare(version + 1)
        gated.gate.failure = SourceDiedError(0, "killed by the test")
        with pytest.raises(SourceDiedError):
            group.first.subscriber.commit(version + 1)
        gated.reset()
    asked = version - 1 if fault == "another version" else version
    with pytest.raises(CannotLendError):
        group.first.subscriber.lend(asked)


def test_an_engine_that_rounded_a_tensor_is_refused_by_name(world: World, group: Group) -> None:
    rounded = group.make_engine("rounded")
    rounded.model.to(torch.bfloat16)
    group.sync.add_member(rounded)
    version = group.update()
    group.sync.remove_engine("first")
    group.release()
    late = group.make_engine("late")
    assert group.sync.add_member(late) == 0
    following = group.update()
    assert late.fingerprint == expected_fingerprint(following)
    assert following > version


def test_the_failure_of_the_last_source_reaches_the_user(world: World, group: Group) -> None:
    group.update()
    late = group.make_engine("late")

    def fail() -> None:
        in_mid_read_of(late, fail)
        raise SourceDiedError(1, "killed by the test")

    in_mid_read_of(late, fail)
    with pytest.raises(UpdateFailedError) as caught:
        group.sync.add_member(late)
    assert isinstance(caught.value.__cause__, SourceDiedError)
    assert "late" not in group.sync.engines


def test_trainers_that_are_gone_are_named_when_no_engine_can_lend() -> None:
    silent = {"world_size": 1, "trainers": {0: {"alive": False, "version": 3, "writing": False}}}
    assert [str(source) for source in find_sources(silent, [], 3)] == ["the trainers"]
    alive = {"world_size": 1, "trainers": {0: {"alive": True, "version": 3, "writing": True}}}
    assert [source.has_version for source in find_sources(alive, [], 3)] == [False]
