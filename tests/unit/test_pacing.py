"""How long a paced read rests, and what a share may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core import pacing
from rdt_core.errors import ConfigError
from rdt_core.pacing import WITHOUT_REST, Pace, check_read_share, piece_nbytes


class FakeTime:
    """Stands for the module ``time``: moves when somebody sleeps, or is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.slept_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    made = FakeTime()
    monkeypatch.setattr(pacing, "time", made)
    return made


def read(pace: Pace, clock: FakeTime, piece_s: float, *, pieces: int, left_s: float = 60.0) -> None:
    for _ in range(pieces):
        pace.rest(left_s)
        with pace.moving():
            clock.now_s += piece_s


def test_a_quarter_of_the_time_is_spent_moving(clock: FakeTime) -> None:
    read(Pace(0.25), clock, 0.010, pieces=5)
    assert clock.slept_s == pytest.approx(4 * 0.030)  # nothing is owed before the first, nor after the last


def test_without_rest_nobody_sleeps(clock: FakeTime) -> None:
    read(Pace(WITHOUT_REST), clock, 5.0, pieces=3)
    assert clock.slept_s == 0.0


def test_no_rest_outlasts_a_quarter_of_a_second_nor_the_time_that_is_left(clock: FakeTime) -> None:
    read(Pace(0.01), clock, 1.0, pieces=2)
    assert clock.slept_s == 0.25
    read(Pace(0.01), clock, 1.0, pieces=2, left_s=0.1)
    read(Pace(0.01), clock, 1.0, pieces=2, left_s=-1.0)
    assert clock.slept_s == pytest.approx(0.35)


@given(st.integers(0, 2**45))
def test_pieces_are_neither_small_nor_many(total: int) -> None:
    assert piece_nbytes(total) >= 64 * 2**20
    assert piece_nbytes(total) * 64 >= total


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), True, "half", None])
def test_what_is_no_share_is_refused(share: object) -> None:
    with pytest.raises(ConfigError, match="read_share must be a share of the time"):
        check_read_share(share)
