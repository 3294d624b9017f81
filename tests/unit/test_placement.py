from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt_core.placement import Placement, Replicate, ShardDim, StridedShardDim, local_region
from rdt_core.region import Region


def chunk(items: list[int], num_chunks: int, index: int) -> list[int]:
    """One chunk as ``torch.chunk`` cuts: equal ones of the ceiling, then a smaller one, then none."""
    size = math.ceil(len(items) / num_chunks)
    return items[index * size : (index + 1) * size]


def indices(region: Region, dim: int) -> list[int]:
    return list(range(region.start[dim], region.stop[dim]))


@pytest.mark.parametrize(
    ("rows", "ranks", "expected"),
    [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 3, 1]), (5, 4, [2, 2, 1, 0]), (2, 4, [1, 1, 0, 0]), (0, 2, [0, 0])],
)
def test_uneven_rows_are_cut_like_torch_chunk(rows: int, ranks: int, expected: list[int]) -> None:
    cut = [local_region((rows, 3), (ranks,), (rank,), (ShardDim(0),)) for rank in range(ranks)]
    assert [region.shape for region in cut] == [(n, 3) for n in expected]


@given(st.integers(0, 12), st.integers(1, 4), st.integers(1, 4))
def test_two_axes_that_cut_one_dim_cut_one_after_the_other(n: int, first: int, second: int) -> None:
    for i, j in itertools.product(range(first), range(second)):
        region = local_region((n,), (first, second), (i, j), (ShardDim(0), ShardDim(0)))
        assert indices(region, 0) == chunk(chunk(list(range(n)), first, i), second, j)


@given(st.integers(0, 24), st.integers(1, 4), st.integers(1, 4))
def test_fsdp_over_tensor_parallelism_cuts_what_tensor_parallelism_left(n: int, dp: int, tp: int) -> None:
    placements = (StridedShardDim(0, split_factor=tp), ShardDim(0))
    for i, j in itertools.product(range(dp), range(tp)):
        region = local_region((n, 2), (dp, tp), (i, j), placements)
        assert indices(region, 0) == chunk(chunk(list(range(n)), tp, j), dp, i)


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple),
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    st.data(),
)
def test_the_ranks_of_a_mesh_hold_every_element_equally_often(
    shape: tuple[int, ...], mesh: tuple[int, ...], data: st.DataObject
) -> None:
    choices: list[Placement] = [Replicate(), *(ShardDim(dim) for dim in range(len(shape)))]
    placements = [data.draw(st.sampled_from(choices)) for _ in mesh]
    num_replicas = math.prod(n for n, held in zip(mesh, placements, strict=True) if held == Replicate())
    regions = [local_region(shape, mesh, at, placements) for at in itertools.product(*map(range, mesh))]
    for at in itertools.product(*map(range, shape)):
        element = Region(at, tuple(i + 1 for i in at))
        assert sum(region.contains(element) for region in regions) == num_replicas


def test_a_replicated_scalar_is_held_whole() -> None:
    assert local_region((), (2,), (1,), (Replicate(),)) == Region((), ())


@pytest.mark.parametrize(
    ("shape", "mesh", "at", "placements"),
    [
        ((4,), (2,), (0,), ()),
        ((4,), (2,), (2,), (Replicate(),)),
        ((4,), (2,), (-1,), (Replicate(),)),
        ((4,), (2,), (0,), (ShardDim(1),)),
        ((4,), (2,), (0,), (ShardDim(-1),)),
        ((4,), (2, 2), (0, 0), (StridedShardDim(0, 3), ShardDim(0))),
        ((4,), (2, 2), (0, 0), (ShardDim(0), StridedShardDim(0, 2))),
        ((4,), (2,), (0,), (StridedShardDim(0, 2),)),
    ],
)
def test_a_placement_that_makes_no_single_region_is_refused(
    shape: tuple[int, ...], mesh: tuple[int, ...], at: tuple[int, ...], placements: tuple[Placement, ...]
) -> None:
    with pytest.raises(ValueError, match=r"placement|coordinate|split_factor|no dim|differ"):
        local_region(shape, mesh, at, placements)
