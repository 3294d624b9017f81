"""Circles of engine ranks, and the shares of what they read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.errors import ConfigError, WireFormatError
from rdt_core.fan_out import (
    MAX_CIRCLE,
    Neighbour,
    Place,
    check_policy,
    circle_from_wire,
    circles_to_wire,
    cut_reads,
    form_circles,
    landing_key,
    share_bounds,
)
from rdt_core.plan import Plan, Read
from tests.unit.oracle import offsets_of


def place(engine: str, rank: int = 0, key: str = "k", device: str = "") -> Place:
    return Place(Neighbour(engine, rank), key, device)


def test_ranks_that_land_alike_form_a_circle_and_others_read_alone() -> None:
    places = [place("a"), place("a", 1, "other"), place("b"), place("b", 1, "other"), place("c", 0, "alone")]
    circles = form_circles([*places, place("d", 0, "")])
    assert circles[Neighbour("a", 0)] == (Neighbour("a", 0), Neighbour("b", 0))
    assert circles[Neighbour("b", 1)] == (Neighbour("a", 1), Neighbour("b", 1))
    assert {neighbour.engine for neighbour in circles} == {"a", "b"}


def test_of_ranks_on_one_gpu_one_is_in_the_circle() -> None:
    on_one = [place("a", 0, "k", "GPU-1"), place("b", 0, "k", "GPU-1")]
    circle = (Neighbour("a", 0), Neighbour("c", 0))
    assert form_circles([*on_one, place("c", 0, "k", "GPU-2")]) == dict.fromkeys(circle, circle)
    assert form_circles(on_one) == {}


@given(st.integers(0, 60))
def test_circles_are_bounded_and_about_equal_and_everyone_is_in_one(count: int) -> None:
    circles = form_circles([place(f"e{number}") for number in range(count)])
    assert len(circles) == (count if count > 1 else 0)
    sizes = {len(circle) for circle in circles.values()}
    assert not sizes or (max(sizes) <= MAX_CIRCLE and max(sizes) - min(sizes) <= 1)
    assert all(neighbour in circle for neighbour, circle in circles.items())


@st.composite
def landings(draw: st.DrawFn) -> tuple[list[Read], int, int]:
    """Reads that fill a landing memory with gaps, its size, and a number of shares."""
    reads, end = [], 0
    for number in range(draw(st.integers(0, 12))):
        end += draw(st.integers(0, 200))
        row_nbytes, num_rows = draw(st.integers(1, 700)), draw(st.sampled_from((1, 1, 2, 7)))
        reads.append(
            Read(
                trainer_rank=0,
                window=f"w{number}",
                offset_bytes=draw(st.integers(0, 99)),
                nbytes=row_nbytes * num_rows,
                landing_offset_bytes=end,
                num_rows=num_rows,
                pitch_bytes=row_nbytes + draw(st.integers(0, 9)) if num_rows > 1 else 0,
            )
        )
        end += row_nbytes * num_rows
    return reads, end + draw(st.integers(0, 100)), draw(st.integers(1, 9))


def bytes_of(reads: list[Read]) -> Counter[tuple[int, str, int]]:
    """(place in the landing memory, window, place there) of every byte."""
    return Counter(
        (into, read.window, at)
        for read in reads
        for into, at in zip(offsets_of(read.target), offsets_of(read.source), strict=True)
    )


@given(landings())
def test_shares_are_the_same_bytes_each_within_its_bounds(landing: tuple[list[Read], int, int]) -> None:
    reads, nbytes, count = landing
    bounds = share_bounds(nbytes, count)
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, nbytes, count + 1)
    shares = cut_reads(reads, bounds)
    assert bytes_of([read for share in shares for read in share]) == bytes_of(reads)
    for share, start, end in zip(shares, bounds, bounds[1:], strict=False):
        assert all(start <= read.landing_offset_bytes for read in share)
        assert all(read.landing_offset_bytes + read.nbytes <= end for read in share)
        assert all(read.nbytes > 0 for read in share)


def test_the_key_tells_plans_and_nodes_apart() -> None:
    read = Read(trainer_rank=0, window="w", offset_bytes=0, nbytes=8, landing_offset_bytes=0)
    other = Read(trainer_rank=1, window="w", offset_bytes=0, nbytes=8, landing_offset_bytes=0)
    plan = Plan(engine_rank=0, reads={0: (read,)}, landing_nbytes=8)
    keys = {
        landing_key(plan, "node"),
        landing_key(plan, "another"),
        landing_key(Plan(engine_rank=0, reads={1: (other,)}, landing_nbytes=8), "node"),
        landing_key(Plan(engine_rank=0, reads={0: (read,)}, landing_nbytes=16), "node"),
    }
    assert len(keys) == 4
    assert landing_key(Plan(engine_rank=5, reads={0: (read,)}, landing_nbytes=8), "node") in keys


def test_circles_survive_the_wire() -> None:
    circles = form_circles([place("a"), place("b"), place("a", 1, "o"), place("b", 1, "o")])
    wire = circles_to_wire(circles, "a")
    assert circle_from_wire(wire, "a", 1) == (Neighbour("a", 1), Neighbour("b", 1))
    assert circle_from_wire(wire, "a", 2) == ()
    assert circles_to_wire(circles, "c") == {}


@pytest.mark.parametrize(
    "circles",
    [
        [],
        "0",
        {"0": 7},
        {"0": [["a"]]},
        {"0": [["a", True], ["b", 0]]},
        {"0": [["a", "0"], ["b", 0]]},
        {"0": [["b", 0], ["c", 0]]},
        {"0": [["a", 0], ["a", 0]]},
        {"0": [["a", 0], ["b", 0], ["b", 0]]},
        {"0": [["a", 0], *(["b", n] for n in range(MAX_CIRCLE))]},
    ],
)
def test_what_is_no_circle_of_this_rank_is_refused(circles: Any) -> None:
    with pytest.raises(WireFormatError):
        circle_from_wire(circles, "a", 0)


def test_policies_are_checked() -> None:
    assert check_policy("always") == "always"
    with pytest.raises(ConfigError, match="'sometimes'"):
        check_policy("sometimes")
