"""What a roster counts is what one finds by looking at every rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rdt_core.roster import SILENT_S, KnownTrainer, Roster
from rdt_core.signals import Signal

WORLD_SIZE = 3
ranks = st.integers(0, WORLD_SIZE - 1)
versions = st.integers(0, 3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), ranks, versions, st.booleans()),
        st.tuples(st.just("note"), ranks, versions, st.booleans()),
        st.tuples(st.just("drop"), ranks, versions, st.booleans()),
    )
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def trainer(clock: Clock, version: int, *, is_writing: bool, instance: str = "a") -> KnownTrainer:
    return KnownTrainer(
        instance=instance,
        manifest=b"",
        last_seen=clock(),
        changed=Signal(clock),
        version=version,
        is_writing=is_writing,
    )


@given(steps)
def test_counts_agree_with_every_rank(history: list[tuple[str, int, int, bool]]) -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.world_size = WORLD_SIZE
    for act, rank, version, is_writing in history:
        known = roster.get(rank)
        if act == "enter":
            roster.enter(rank, trainer(clock, version, is_writing=is_writing))
        elif act == "drop":
            roster.drop(rank)
        elif known is not None:
            roster.note(known, version, is_writing=is_writing)
        held = {number: found.version for number, found in roster}
        assert roster.newest == max(held.values(), default=0)
        for asked in range(1, 4):
            assert roster.have_published(asked) == (not roster.ranks_behind(asked))
            assert roster.are_writing(asked) == bool(roster.ranks_writing(asked))
            behind = tuple(number for number in range(WORLD_SIZE) if held.get(number, 0) < asked)
            assert roster.ranks_behind(asked) == behind


def test_the_topology_is_another_one_when_a_process_was_replaced() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.world_size = 2
    for rank in range(2):
        roster.enter(rank, trainer(clock, 0, is_writing=True, instance=f"of {rank}"))
    first = roster.topology
    assert roster.topology == first
    roster.enter(1, trainer(clock, 0, is_writing=True, instance="another"))
    replaced = roster.topology
    assert replaced != first
    roster.enter(1, trainer(clock, 0, is_writing=True, instance="of 1"))
    assert roster.topology == first


def test_a_silent_rank_is_missing_until_it_speaks_again() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.world_size = 1
    assert not roster.are_complete()
    roster.enter(0, trainer(clock, 0, is_writing=True))
    assert roster.are_complete()
    clock.now += 2 * SILENT_S
    assert roster.missing() == (0,)
    assert not roster.is_alive(0)
    roster.hear(roster[0])
    assert roster.are_complete()
