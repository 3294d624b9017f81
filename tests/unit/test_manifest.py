from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given

from rdt_core.errors import UnknownDtypeError
from rdt_core.manifest import Manifest, TensorSpec, Window, find_fault
from rdt_core.region import Region
from tests.unit.strategies import manifests
from tests.unit.worlds_by_hand import NAME, around, box, dense_shard, holding

GOOD = holding(box((0, 2), (0, 4)), box((2, 4), (0, 4)), shape=(4, 4))


def with_shard(**changes: Any) -> Manifest:
    return dataclasses.replace(GOOD, shards=(GOOD.shards[0], dataclasses.replace(GOOD.shards[1], **changes)))


@given(manifests())
def test_a_random_layout_makes_a_manifest_without_fault(manifest: Manifest) -> None:
    assert find_fault(manifest) is None


def test_a_manifest_counts_the_bytes_of_its_elements() -> None:
    assert GOOD.nbytes == 32
    padded = dataclasses.replace(GOOD.shards[0], stride_bytes=(100, 2))
    assert padded.nbytes == 16


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (dataclasses.replace(GOOD, side="driver"), "side is 'driver'"),
        (dataclasses.replace(GOOD, rank=16), "rank 16 is not one of 16"),
        (dataclasses.replace(GOOD, rank=-1), "rank -1"),
        (dataclasses.replace(GOOD, windows={"x": Window("w", 32)}), "filed under 'x'"),
        (dataclasses.replace(GOOD, windows={"w": Window("w", -1)}), "has -1 bytes"),
        (dataclasses.replace(GOOD, tensors={"x": GOOD.tensors[NAME]}), "filed under 'x'"),
        (dataclasses.replace(GOOD, tensors={NAME: TensorSpec(NAME, (-4, 4), "bfloat16")}), "has shape"),
        (dataclasses.replace(GOOD, tensors={}), "not described"),
        (with_shard(window="elsewhere"), "'elsewhere' names one that is not described"),
        (with_shard(tensor="elsewhere"), "'elsewhere' in window"),
        (with_shard(region=box((0, 4))), "must have 2 dims"),
        (with_shard(stride_bytes=(2,)), "must have 2 dims"),
        (with_shard(region=box((2, 5), (0, 4))), "outside of its shape"),
        (with_shard(offset_bytes=-2), "negative"),
        (with_shard(stride_bytes=(-8, 2)), "negative"),
        (with_shard(offset_bytes=1), "not aligned"),
        (with_shard(stride_bytes=(7, 2)), "not aligned"),
        (with_shard(offset_bytes=18), "beyond the 32 bytes"),
        (with_shard(stride_bytes=(10, 2)), "beyond the 32 bytes"),
        (with_shard(region=Region((2, 0), (2, 4)), offset_bytes=34), "beyond the 32 bytes"),
    ],
)
def test_a_fault_is_put_into_words(manifest: Manifest, expected: str) -> None:
    assert expected in (find_fault(manifest) or "")


def test_an_unknown_dtype_is_an_error_wherever_it_stands() -> None:
    with pytest.raises(UnknownDtypeError):
        find_fault(with_shard(dtype="float3"))
    with pytest.raises(UnknownDtypeError):
        find_fault(dataclasses.replace(GOOD, tensors={NAME: TensorSpec(NAME, (4, 4), "float3")}))


def test_a_shard_may_end_with_its_window_and_an_empty_one_may_lie_anywhere_in_it() -> None:
    shard = dense_shard(box((0, 2), (0, 4)), dtype="bfloat16")
    empty = dense_shard(Region((4, 0), (4, 4)), offset=16, dtype="bfloat16")
    assert find_fault(around(shard, empty, shapes={NAME: (4, 4)})) is None
