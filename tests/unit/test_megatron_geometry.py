"""Which elements of which tensors Megatron's parameters hold, against a cut of labelled elements."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.coverage import find_overlap, find_uncovered
from rdt_core.region import Region
from rdt_megatron.geometry import Axis, Coordinate, ParameterShapeError, Sizes, pieces_of, tensor_name
from rdt_megatron.rules import Fused, Match, Rule, Split, StackedExperts, Vocabulary, Whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_megatron.geometry import Piece

Element = tuple[str, tuple[int, ...]]
small = st.integers(1, 4)
SIZES = Sizes(vocab=10, is_tied=False, num_heads=4, num_query_groups=2, head_dim=2)


def named_pieces(rule: Rule, shape: tuple[int, ...], at: Coordinate, sizes: Sizes) -> list[tuple[str, Piece]]:
    match = Match(rule, None, None)
    return [(tensor_name(piece, match, at, sizes), piece) for piece in pieces_of(rule, shape, at, sizes)]


def elements_of(tensor: str, piece: Piece) -> Iterator[tuple[int, Element]]:
    """Every element of a piece: its place in the parameter, and its tensor and index."""
    for index in itertools.product(*(range(n) for n in piece.region.shape)):
        place = piece.offset + sum(i * stride for i, stride in zip(index, piece.strides, strict=True))
        where = tuple(a + i for a, i in zip(piece.region.start, index, strict=True))
        yield place, (tensor, where)


def held_by(rule: Rule, shape: tuple[int, ...], at: Coordinate, sizes: Sizes) -> dict[int, Element]:
    held: dict[int, Element] = {}
    for tensor, piece in named_pieces(rule, shape, at, sizes):
        for place, element in elements_of(tensor, piece):
            assert place not in held, "two elements of tensors share one of the parameter"
            held[place] = element
    return held


def assert_covers(pieces: list[tuple[str, Piece]]) -> None:
    """All ranks together hold every tensor once."""
    shapes: dict[str, tuple[int, ...]] = {}
    regions: dict[str, list[Region]] = {}
    for tensor, piece in pieces:
        assert shapes.setdefault(tensor, piece.shape) == piece.shape
        regions.setdefault(tensor, []).append(piece.region)
    for tensor, shape in shapes.items():
        assert find_overlap(sorted(regions[tensor], key=lambda region: region.start)) is None
        assert find_uncovered(Region.whole(shape), regions[tensor]) is None


def at_tp(rank: int, size: int) -> Coordinate:
    return Coordinate(tp=Axis(rank, size), etp=Axis(rank, size))


@given(
    groups=small,
    heads_per_group=small,
    head_dim=small,
    columns=st.none() | small,
    num_ranks=st.integers(1, 12),
)
def test_heads_are_grouped_before_rows_are_cut_also_where_ranks_outnumber_groups(
    groups: int, heads_per_group: int, head_dim: int, columns: int | None, num_ranks: int
) -> None:
    rows: list[tuple[str, int]] = []
    for group in range(groups):
        first = group * heads_per_group * head_dim
        rows += [("q", row) for row in range(first, first + heads_per_group * head_dim)]
        rows += [(name, row) for name in "kv" for row in range(group * head_dim, (group + 1) * head_dim)]
    num_local, uneven = divmod(len(rows), num_ranks)
    if uneven:
        return
    sizes = replace(SIZES, num_heads=groups * heads_per_group, num_query_groups=groups, head_dim=head_dim)
    rule = Fused("p", into=("q", "k", "v"), interleave="by_query_group")
    pieces: list[tuple[str, Piece]] = []
    for rank in range(num_ranks):
        own = rows[rank * num_local : (rank + 1) * num_local]
        shape = (num_local,) if columns is None else (num_local, columns)
        ends = [()] if columns is None else [(column,) for column in range(columns)]
        expected = enumerate((name, (row, *end)) for name, row in own for end in ends)
        assert held_by(rule, shape, at_tp(rank, num_ranks), sizes) == dict(expected)
        pieces += named_pieces(rule, shape, at_tp(rank, num_ranks), sizes)
    assert_covers(pieces)


@given(num_tensors=small, num_rows=small, columns=small, num_ranks=small)
def test_a_rank_holds_an_equal_part_of_every_fused_tensor(
    num_tensors: int, num_rows: int, columns: int, num_ranks: int
) -> None:
    names = tuple("abcd"[:num_tensors])
    rule = Fused("p", into=names)
    pieces: list[tuple[str, Piece]] = []
    for rank in range(num_ranks):
        labels = [(name, rank * num_rows + row) for name in names for row in range(num_rows)]
        expected = [(name, (row, column)) for name, row in labels for column in range(columns)]
        shape = (num_rows * num_tensors, columns)
        assert held_by(rule, shape, at_tp(rank, num_ranks), SIZES) == dict(enumerate(expected))
        pieces += named_pieces(rule, shape, at_tp(rank, num_ranks), SIZES)
    assert_covers(pieces)


@given(shape=st.lists(small, min_size=1, max_size=3), dim=st.integers(0, 2), num_ranks=small)
def test_a_split_parameter_is_one_block_of_its_dim(shape: list[int], dim: int, num_ranks: int) -> None:
    dim %= len(shape)
    rule = Split("p", "t", dim=dim)
    pieces = [
        piece
        for rank in range(num_ranks)
        for piece in named_pieces(rule, tuple(shape), at_tp(rank, num_ranks), SIZES)
    ]
    assert [piece.region.start[dim] for _, piece in pieces] == [
        rank * shape[dim] for rank in range(num_ranks)
    ]
    assert_covers(pieces)
    for tensor, piece in pieces:
        assert [place for place, _ in elements_of(tensor, piece)] == list(range(math.prod(shape)))


@given(vocab=st.integers(1, 40), rows=st.integers(1, 20), num_ranks=small)
def test_padding_of_the_vocabulary_belongs_to_no_tensor(vocab: int, rows: int, num_ranks: int) -> None:
    sizes, rule = replace(SIZES, vocab=vocab), Vocabulary("p", "t")
    if rows * num_ranks < vocab:
        with pytest.raises(ParameterShapeError, match=f"vocabulary of {vocab}"):
            list(pieces_of(rule, (rows, 2), at_tp(0, num_ranks), sizes))
        return
    held = [held_by(rule, (rows, 2), at_tp(rank, num_ranks), sizes) for rank in range(num_ranks)]
    flat = [
        held[row // rows].get(row % rows * 2 + column) for row in range(rows * num_ranks) for column in (0, 1)
    ]
    real = [("t", (row, column)) for row in range(vocab) for column in (0, 1)]
    assert flat == real + [None] * (len(flat) - len(real))


@given(num_local=small, num_ep=small, num_etp=small, features=small, hidden=small)
def test_stacked_experts_are_transposed_matrices_one_behind_the_other(
    num_local: int, num_ep: int, num_etp: int, features: int, hidden: int
) -> None:
    sizes = replace(SIZES, num_experts=num_local * num_ep)
    gate_up = StackedExperts("p", into=("g{expert}", "u{expert}"), stacked_dim=1)
    down = StackedExperts("p", into=("d{expert}",), stacked_dim=0)
    pieces: list[tuple[str, Piece]] = []
    for ep, etp in itertools.product(range(num_ep), range(num_etp)):
        at = Coordinate(etp=Axis(etp, num_etp), ep=Axis(ep, num_ep))
        experts = range(ep * num_local, (ep + 1) * num_local)
        own = range(etp * features, (etp + 1) * features)
        first = [(f"{kind}{e}", (f, h)) for e in experts for h in range(hidden) for kind in "gu" for f in own]
        second = [(f"d{e}", (h, f)) for e in experts for f in own for h in range(hidden)]
        shapes = ((hidden, num_local * 2 * features), (num_local * features, hidden))
        assert held_by(gate_up, shapes[0], at, sizes) == dict(enumerate(first))
        assert held_by(down, shapes[1], at, sizes) == dict(enumerate(second))
        for rule, shape in zip((gate_up, down), shapes, strict=True):
            pieces += named_pieces(rule, shape, at, sizes)
    assert_covers(pieces)


def test_an_expert_is_counted_on_from_those_of_the_ranks_before() -> None:
    rule = Split("p{expert}", "layer {layer} expert {expert}", axis="etp")
    at = Coordinate(tp=Axis(1, 4), ep=Axis(2, 4), etp=Axis(0, 2))
    sizes = replace(SIZES, num_experts=8)
    (piece,) = pieces_of(rule, (3, 2), at, sizes)
    assert tensor_name(piece, Match(rule, 5, 1), at, sizes) == "layer 5 expert 5"
    assert piece.shape == (6, 2), "experts are cut along their own tensor-parallel axis"


def test_an_output_that_is_tied_is_the_embedding() -> None:
    rule = Vocabulary("p", "head", tied_into="embedding")
    for is_tied, name in ((True, "embedding"), (False, "head")):
        (piece,) = pieces_of(rule, (12, 2), Coordinate(), replace(SIZES, is_tied=is_tied))
        assert (piece.into, piece.shape) == (name, (10, 2))


def test_a_projection_that_some_specs_repeat_is_told_from_a_split_one_by_its_size() -> None:
    rule = Split("p", "t", size="query_latent")
    sizes = replace(SIZES, query_latent=6)
    regions = [
        str(piece.region) for rows in (6, 3) for piece in pieces_of(rule, (rows, 2), at_tp(1, 2), sizes)
    ]
    assert regions == ["[0:6, 0:2]", "[3:6, 0:2]"]


@pytest.mark.parametrize(
    ("rule", "shape", "reason"),
    [
        (Split("p", "t", size="key_value_latent"), (4, 2), "expected 6 or its part"),
        (Fused("p", into=("a", "b")), (5, 2), "cannot share 5 rows"),
        (Fused("p", into=("q", "k", "v"), interleave="by_query_group"), (12, 2), "expected 16 rows"),
        (StackedExperts("p", into=("a", "b"), stacked_dim=1), (4, 6), "cannot share 6 features"),
    ],
)
def test_a_shape_that_the_rule_does_not_give_is_refused_with_numbers(
    rule: Rule, shape: tuple[int, ...], reason: str
) -> None:
    sizes = replace(SIZES, key_value_latent=6, num_experts=8)
    with pytest.raises(ParameterShapeError, match=reason):
        list(pieces_of(rule, shape, at_tp(0, 2), sizes))


def test_a_whole_parameter_is_the_same_in_every_rank() -> None:
    pieces = [
        piece for rank in range(3) for piece in pieces_of(Whole("p", "t"), (4, 2), at_tp(rank, 3), SIZES)
    ]
    assert len({(piece.into, piece.region) for piece in pieces}) == 1
