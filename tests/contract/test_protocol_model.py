"""Random histories of a whole group, checked after every step against what the protocol promises.

Real publishers, subscribers, coordinator and driver; links of memory; a clock that jumps. What happens in
the middle of a read is drawn as well. The promises: an engine that serves holds every byte of one version,
committed versions never go back, no lease outlives its read, and no call outlives its deadline.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from rdt_core import WeightSync, transports
from rdt_core.client import LocalChannel
from rdt_core.connection import TRAINERS
from rdt_core.errors import RdtError, SourceDiedError
from rdt_core.lifecycle import SyncState
from rdt_core.member import MARGIN_S
from rdt_core.roster import SILENT_S
from tests.contract import gated
from tests.contract.local_engine import LocalEngine
from tests.contract.world import GROUP, Clock, TrainerRank, World, expected_fingerprint
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rdt_core.leases import Lease
    from rdt_core.report import SyncReport

UPDATE_TIMEOUT_S = 3.0
LEASES_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 30.0

# Connect, three phases and the abort, each within its own deadline; and a machine that is busy.
LONGEST_CALL_S = CONNECT_TIMEOUT_S + 6 * (UPDATE_TIMEOUT_S + MARGIN_S)

expected = functools.cache(expected_fingerprint)
names = (f"engine-{number}" for number in itertools.count())

MID_READ = (
    "nothing",
    "nothing",
    "nothing",
    "publish",
    "release",
    "fail",
    "restart coordinator",
    "let leases run out",
)

MID_LOAN = (*MID_READ, "lender commits", "lender is killed")


class Group(RuleBasedStateMachine):
    """One history. The trainers and the coordinator live on from history to history, as the versions do."""

    world: ClassVar[World]
    clock: ClassVar[Clock]

    num_updated: ClassVar[int] = 0
    num_lent: ClassVar[int] = 0

    engines = Bundle("engines")

    def __init__(self) -> None:
        super().__init__()
        gated.reset()
        self.made: list[LocalEngine] = []
        self.served: dict[str, int] = {}
        asked = {"group": GROUP, "transport": gated.NAME, "mode": "staged", "timeout_s": CONNECT_TIMEOUT_S}
        asked["fan_out"] = "always"
        self.sync = WeightSync(self.world.client, [], asked, observers=[self])

    def teardown(self) -> None:
        gated.reset()
        for engine in self.made:
            engine.is_dead = False
        self.sync.close()
        for engine in self.made:
            engine.stop()

    def on_connected(self, group: str, engines: object) -> None:
        """An observer of the driver; not kept."""

    def on_synced(self, group: str, report: SyncReport) -> None:
        """An observer of the driver: how often an engine lent."""
        Group.num_lent += report.source != TRAINERS

    def on_failed(self, group: str, failure: object) -> None:
        """An observer of the driver; not kept."""

    def on_closed(self, group: str) -> None:
        """An observer of the driver; not kept."""

    @initialize(target=engines)
    def begin_with_an_engine(self) -> LocalEngine:
        return self.join_engine()

    @rule(target=engines)
    def add_engine(self) -> LocalEngine:
        return self.join_engine()

    def join_engine(self) -> LocalEngine:
        engine = LocalEngine(self.world.channel, next(names))
        self.made.append(engine)
        self.attempt(lambda: self.sync.add_member(engine, timeout_s=CONNECT_TIMEOUT_S))
        return engine

    @rule(
        target=engines, event=st.sampled_from(MID_LOAN), mode=st.sampled_from(("staged", "pinned", "inplace"))
    )
    def add_engine_that_borrows(self, event: str, mode: str) -> LocalEngine:
        """The trainers write, so that whoever joins reads from another engine, if one serves a version."""
        self.publish()
        self.bring_all_to(self.version)
        self.release()
        asked, self.sync._asked = self.sync._asked, {**self.sync._asked, "mode": mode}
        happen = functools.lru_cache(1)(functools.partial(self.happen, event))
        # Not in a probe of the connect, which holds no lease.
        gated.gate.on_reach = lambda: happen() if self.is_any_reading() else None
        engine = self.join_engine()
        gated.reset()
        self.sync._asked = asked
        return engine

    @rule(engine=consumes(engines))
    def remove_engine(self, engine: LocalEngine) -> None:
        self.attempt(lambda: self.sync.remove_engine(engine.url))

    @rule(engine=engines)
    def kill_or_revive_engine(self, engine: LocalEngine) -> None:
        engine.is_dead = not engine.is_dead

    @rule()
    def publish(self) -> None:
        version = self.version + 1
        for rank in self.world.trainers:
            with rank.publisher.writing(timeout_s=0.0):
                rank.write(version)
        for rank in self.world.trainers:
            rank.publisher.publish(version)

    @rule()
    def release(self) -> None:
        for rank in self.world.trainers:
            rank.publisher.release(timeout_s=0.0)

    @rule()
    def restart_coordinator(self) -> None:
        self.world.channel.restart()
        wait_for(lambda: len(self.world.client.status()["trainers"]) == len(self.world.trainers))

    @rule(num_ranks=st.sampled_from((1, 2)))
    def replace_trainers(self, num_ranks: int) -> None:
        for rank in self.world.trainers:
            rank.publisher._is_closed.set()
        self.clock.skip(2 * SILENT_S)
        # Wakes whoever waits at the coordinator, to see how late it is.
        self.world.client.leave("nobody", 0)
        for rank in self.world.trainers:
            rank.die()
        self.world.trainers[:] = [
            TrainerRank(self.world.channel, rank, num_ranks) for rank in range(num_ranks)
        ]

    @rule(
        is_new=st.sampled_from((True, True, True, False)),
        event=st.sampled_from(MID_READ),
        mode=st.sampled_from((None, "staged", "pinned", "inplace")),
        policy=st.sampled_from(("group", "engine")),
        verify=st.sampled_from((None, "digest")),
    )
    def update(self, is_new: bool, event: str, mode: str | None, policy: str, verify: str | None) -> None:
        if is_new:
            self.publish()
        version = self.version
        if version == 0:
            return
        gated.gate.on_reach = functools.lru_cache(1)(functools.partial(self.happen, event))
        self.bring_all_to(version, mode=mode, commit_policy=policy, verify=verify)
        gated.reset()
        wait_for(lambda: all(engine.subscriber.status()["state"] != "reading" for engine in self.made))

    def bring_all_to(self, version: int, **options: Any) -> None:
        Group.num_updated += self.attempt(
            lambda: self.sync.update(version, timeout_s=UPDATE_TIMEOUT_S, **options)
        )

    def happen(self, event: str) -> None:
        """In the middle of a pull, in the thread that reads."""
        if event == "publish":
            self.publish()
        elif event == "release":
            self.release()
        elif event == "fail":
            raise SourceDiedError(0, "killed in a history")
        elif event == "restart coordinator":
            self.world.channel.restart()
        elif event == "lender commits":
            self.publish()
            self.commit_beside(self.lenders())
        elif event == "lender is killed":
            for engine in self.lenders():
                engine.is_dead = True
            raise SourceDiedError(0, "killed in a history")
        elif event == "let leases run out":
            self.clock.skip(2 * UPDATE_TIMEOUT_S)

    def is_any_reading(self) -> bool:
        states = {engine.subscriber.status()["state"] for engine in self.made}
        return not states.isdisjoint(("reading", "flipping"))

    def lenders(self) -> list[LocalEngine]:
        """Engines that lend now."""
        names = self.world.client.status()["lending"]
        return [engine for engine in self.made if engine.url in names]

    def commit_beside(self, engines: list[LocalEngine]) -> None:
        """Another driver brings engines to the version that was published last."""
        for engine in engines:
            payload = {"version": self.version, "timeout_s": UPDATE_TIMEOUT_S}
            with contextlib.suppress(RdtError):
                engine.call("prepare", payload, timeout_s=UPDATE_TIMEOUT_S)
                engine.call("commit", payload, timeout_s=UPDATE_TIMEOUT_S)

    def attempt(self, call: Callable[[], object]) -> bool:
        """A call that may fail, with an error of ours and in time; whether it did not."""
        started, is_done = time.monotonic(), False
        with contextlib.suppress(RdtError):
            call()
            is_done = True
        assert time.monotonic() - started < LONGEST_CALL_S
        return is_done

    @property
    def version(self) -> int:
        return self.world.trainers[0].publisher.version

    @invariant()
    def an_engine_that_serves_holds_one_version_whole(self) -> None:
        for engine in self.made:
            version = engine.subscriber.version
            if version and not engine.subscriber.is_torn:
                assert engine.fingerprint == expected(version)

    @invariant()
    def committed_versions_never_go_back(self) -> None:
        for engine in self.made:
            assert engine.subscriber.version >= self.served.get(engine.url, 0)
            self.served[engine.url] = engine.subscriber.version

    @invariant()
    def no_lease_outlives_its_read(self) -> None:
        """A read that was taken back may still be in its pull when the driver has its error."""
        wait_for(lambda: not self.leases(), LEASES_TIMEOUT_S)

    def leases(self) -> list[Lease]:
        """On trainers, on what is lent, on what neighbours landed. The clock ends none by itself."""
        coordinator = self.world.channel._coordinator
        books = [coordinator._leases, *(lender._leases for lender in list(coordinator._lending.values()))]
        return [lease for book in books for lease in book.active()]

    @invariant()
    def the_driver_is_free_for_the_next_call(self) -> None:
        assert self.sync._life.state is SyncState.IDLE


@pytest.fixture
def living_world() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(transports._FACTORIES, gated.NAME, "tests.contract.gated:GatedTransport")
        # A reader stands still while its lender waits for it; the wait is real.
        patch.setattr("rdt_core.subscriber.GRACE_S", 0.1)
        clock = Clock()
        channel = LocalChannel(GROUP, clock)
        Group.world = World(channel, [TrainerRank(channel, rank, 2) for rank in range(2)])
        Group.clock = clock
        yield
        Group.world.close()


def test_no_history_breaks_a_promise(living_world: None) -> None:
    del living_world
    run_state_machine_as_test(
        Group,
        settings=settings(
            max_examples=8,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # Histories in which nothing ever works would prove nothing.
    assert Group.num_updated > 5
    assert Group.num_lent > 0
