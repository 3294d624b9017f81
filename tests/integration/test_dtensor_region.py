"""Regions computed from placements, against the elements that DTensor's own splitting hands to a rank."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from rdt_megatron.dtensor_region import NotOneBoxError, held_region

_PLACEMENTS = st.one_of(
    st.just(Replicate()),
    st.builds(Shard, st.integers(0, 1)),
    st.builds(_StridedShard, st.integers(0, 1), split_factor=st.integers(1, 4)),
)
_LAYOUTS = st.integers(1, 3).flatmap(
    lambda axes: st.tuples(
        st.tuples(st.integers(1, 17), st.integers(1, 9)),
        st.tuples(*[st.integers(1, 4)] * axes),
        st.tuples(*[_PLACEMENTS] * axes),
    )
)


def _elements(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> torch.Tensor:
    """Flat indices of the elements that a rank is given when every axis splits in turn, as DTensor does."""
    held = torch.arange(math.prod(shape)).reshape(shape)
    for num_ranks, index, placement in zip(mesh, coordinate, placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            parts, _ = placement._split_tensor(held, num_ranks, with_padding=False, contiguous=False)
            held = parts[index]
    return held


@given(_LAYOUTS)
def test_a_region_is_exactly_what_dtensor_hands_out_and_separate_runs_are_refused(
    layout: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh, placements = layout
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for coordinate in itertools.product(*map(range, mesh)):
        expected = _elements(shape, mesh, coordinate, placements)
        if _is_fsdp_over_tp(mesh, placements):
            continue
        try:
            region = held_region(shape, mesh, coordinate, placements)
        except NotOneBoxError:
            assert not _is_box(expected, whole)
            continue
        if not expected.numel():
            assert not region.num_elements
            continue
        (top, left), (bottom, right) = region.start, region.stop
        assert torch.equal(whole[top:bottom, left:right], expected)


def _is_fsdp_over_tp(mesh: tuple[int, ...], placements: tuple[Placement, ...]) -> bool:
    """What only ``fully_shard`` makes, and cuts in its own order (below)."""
    for dim in range(2):
        cuts = [(n, p) for n, p in zip(mesh, placements, strict=True) if getattr(p, "dim", None) == dim]
        factors = [getattr(p, "split_factor", 1) for _, p in cuts]
        right = [math.prod(n for n, _ in cuts[at + 1 :]) for at in range(len(cuts))]
        if max(factors, default=1) > 1 and all(f in (1, r) for f, r in zip(factors, right, strict=True)):
            return True
    return False


def _is_box(expected: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether the rows and the columns held are consecutive."""
    rows, columns = expected // whole.shape[1], expected % whole.shape[1]
    return bool((rows.diff(dim=0) == 1).all()) and bool((columns.diff(dim=1) == 1).all())


@given(st.integers(0, 60), st.integers(1, 6), st.integers(2, 6))
def test_fsdp_over_tensor_parallelism_holds_the_rows_that_it_cut_out_of_each_tensor_parallel_part(
    rows: int, dp: int, tp: int
) -> None:
    placements = (_StridedShard(0, split_factor=tp), Shard(0))
    for tp_rank, part in enumerate(_chunks(torch.arange(rows), tp)):
        for dp_rank, expected in enumerate(_chunks(part, dp)):
            region = held_region((rows,), (dp, tp), (dp_rank, tp_rank), placements)
            assert list(range(region.start[0], region.stop[0])) == expected.tolist()


def _chunks(tensor: torch.Tensor, num_chunks: int) -> list[torch.Tensor]:
    """``torch.chunk``, with the empty ones that it leaves out."""
    chunks = list(torch.chunk(tensor, num_chunks)) if len(tensor) else []
    return chunks + [tensor[:0]] * (num_chunks - len(chunks))


def test_partial_sums_are_refused() -> None:
    with pytest.raises(NotOneBoxError, match="neither a shard nor a replica"):
        held_region((4,), (2,), (0,), (Partial(),))
