"""Regions computed from placements, against what DTensor's own ``distribute_tensor`` hands to a rank."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from rdt_megatron.dtensor_region import NotOneBoxError, held_region


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]:
    """A shape of one or two dims, a mesh of one or two axes, and a placement an axis."""
    shape = tuple(draw(st.lists(st.integers(1, 17), min_size=1, max_size=2)))
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    dims = st.integers(0, len(shape) - 1)
    placement = st.one_of(
        st.just(Replicate()),
        st.builds(Shard, dims),
        st.builds(_StridedShard, dims, split_factor=st.integers(1, 4)),
    )
    return shape, mesh, tuple(draw(placement) for _ in mesh)


@given(_layouts())
@settings(max_examples=60, deadline=None)
def test_a_region_is_exactly_what_dtensor_hands_out_and_separate_runs_are_refused(
    layout: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh, placements = layout
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for rank, coordinate in enumerate(itertools.product(*map(range, mesh))):
        if _is_fsdp_over_tp(mesh, placements) and not _is_even(shape, mesh, placements):
            continue
        held = _distribute(whole, mesh, placements, rank)
        try:
            region = held_region(shape, mesh, coordinate, placements)
        except NotOneBoxError:
            assert not _is_box(held, whole)
            continue
        if not held.numel():
            assert not region.num_elements
            continue
        slices = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
        assert torch.equal(whole[slices], held)


def _distribute(
    whole: torch.Tensor, mesh: tuple[int, ...], placements: tuple[Placement, ...], rank: int
) -> torch.Tensor:
    """What ``distribute_tensor`` leaves one rank of a world that no other process is part of."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(mesh))
    try:
        names = tuple(f"axis{number}" for number in range(len(mesh)))
        device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
        # Every rank cuts its own copy: nothing is sent.
        return distribute_tensor(whole, device_mesh, placements, src_data_rank=None).to_local()
    finally:
        dist.destroy_process_group()


def _is_fsdp_over_tp(mesh: tuple[int, ...], placements: tuple[Placement, ...]) -> bool:
    """What only ``fully_shard`` makes, and cuts in its own order (below)."""
    for dim in range(2):
        cuts = [(n, p) for n, p in zip(mesh, placements, strict=True) if getattr(p, "dim", None) == dim]
        factors = [getattr(p, "split_factor", 1) for _, p in cuts]
        right = [math.prod(n for n, _ in cuts[at + 1 :]) for at in range(len(cuts))]
        if max(factors, default=1) > 1 and all(f in (1, r) for f, r in zip(factors, right, strict=True)):
            return True
    return False


def _is_even(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Placement, ...]) -> bool:
    """Whether every dim is a multiple of the number of ranks that cut it: then all orders of cuts agree."""
    return all(
        size % math.prod(n for n, p in zip(mesh, placements, strict=True) if getattr(p, "dim", None) == dim)
        == 0
        for dim, size in enumerate(shape)
    )


def _is_box(expected: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether the rows and the columns held are consecutive."""
    width = whole.shape[-1] if whole.dim() > 1 else 1
    rows, columns = expected // width, expected % width
    consecutive = bool((rows.diff(dim=0) == 1).all())
    return consecutive and (whole.dim() == 1 or bool((columns.diff(dim=1) == 1).all()))


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
