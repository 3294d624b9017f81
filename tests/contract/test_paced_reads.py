"""Reads in pieces: the same bytes, and a word that comes between two pieces ends them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from rdt_core import link_plans
from rdt_core.engine_rpc import parse_connect
from rdt_core.errors import AbortedError, LeaseLostError, SupersededError, TornReadError, WireFormatError
from rdt_core.export_request import parse_export
from tests.contract import gated
from tests.contract.world import Engine, World, expected_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARE = 0.9


@pytest.fixture
def engine(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine whose pieces are so small that the toy model has dozens."""
    monkeypatch.setattr(link_plans, "piece_nbytes", lambda _: 1000)
    made = Engine(world.channel)
    yield made
    made.subscriber.disconnect()


@pytest.fixture
def version(world: World) -> int:
    """A version that all ranks have just published."""
    published = world.trainers[0].publisher.version + 1
    world.publish(published)
    return published


class Pulls:
    """Counts pulls, and does something in the middle of one."""

    def __init__(self, at: int = 0, act: Any = None) -> None:
        self.count, self._at, self._act = 0, at, act
        gated.gate.on_reach = self._reach

    def _reach(self) -> None:
        self.count += 1
        if self.count == self._at:
            self._act()


def test_a_version_that_is_read_in_pieces_lands_whole(engine: Engine, version: int, world: World) -> None:
    info = engine.connect(read_share=SHARE)
    pulls = Pulls()
    for number in (version + 1, version + 2):
        world.publish(number)
        engine.subscriber.prepare(number, verify="digest")
        engine.subscriber.commit(number)
        assert engine.fingerprint == expected_fingerprint(number)
    assert info["read_share"] == SHARE
    assert pulls.count == 2 * info["num_pieces"] > info["read_nbytes"] // 1000


def test_a_read_without_rest_is_one_pull_a_trainer_rank(engine: Engine, version: int) -> None:
    engine.connect()
    pulls = Pulls()
    engine.subscriber.prepare(version)
    assert pulls.count == 2


def test_a_commit_in_place_does_not_rest(engine: Engine, version: int) -> None:
    info = engine.connect("inplace", read_share=SHARE)
    pulls = Pulls()
    engine.subscriber.prepare(version)
    engine.subscriber.commit(version)
    assert engine.fingerprint == expected_fingerprint(version)
    assert info["read_share"] == 1.0
    assert pulls.count == 2


def test_an_abort_ends_a_read_before_its_next_piece(engine: Engine, version: int) -> None:
    engine.connect(read_share=SHARE)
    pulls = Pulls(at=3, act=engine.subscriber.abort)
    with pytest.raises(AbortedError):
        engine.subscriber.prepare(version)
    assert pulls.count == 3


def test_a_trainer_that_writes_between_pieces_without_a_word_is_found_by_digest(
    engine: Engine, version: int, world: World
) -> None:
    engine.connect(read_share=SHARE)
    before = engine.fingerprint

    def write() -> None:
        for rank in world.trainers:
            rank.write(version + 1)

    Pulls(at=3, act=write)
    with pytest.raises(TornReadError):
        engine.subscriber.prepare(version, verify="digest")
    assert engine.fingerprint == before
    for rank in world.trainers:
        rank.write(version)


def test_a_trainer_that_publishes_between_pieces_makes_the_read_fail(
    engine: Engine, version: int, world: World
) -> None:
    engine.connect(read_share=SHARE)
    Pulls(at=3, act=lambda: world.publish(version + 1))
    with pytest.raises(SupersededError):
        engine.subscriber.prepare(version)
    engine.subscriber.prepare(version + 1)
    engine.subscriber.commit(version + 1)
    assert engine.fingerprint == expected_fingerprint(version + 1)


def test_rests_count_towards_the_deadline(engine: Engine, version: int) -> None:
    engine.connect(read_share=0.001)
    with pytest.raises(LeaseLostError):
        engine.subscriber.prepare(version, timeout_s=0.2)
    assert engine.subscriber.version == 0


@pytest.mark.parametrize("share", [0, 2, "half", None, True])
def test_a_request_to_connect_with_no_share_is_refused(share: object) -> None:
    with pytest.raises(WireFormatError, match="read_share"):
        parse_connect({"group": "g", "engine": "e", "read_share": share})


@pytest.mark.parametrize("pieces", [[1], [2, 1], [2, 0], [-1, 3], "2", [1.0, 1.0]])
def test_pieces_that_are_not_all_ranges_are_refused(pieces: object) -> None:
    asked = {"reader": "r", "transport": "memory", "ranges": [("w", 0, 4), ("w", 4, 4)], "arena": []}
    with pytest.raises(WireFormatError):
        parse_export({**asked, "pieces": pieces}, {"w": 8})
    assert parse_export({**asked, "pieces": [1, 1]}, {"w": 8}).pieces == (1, 1)
