"""Replicas of trainer ranks are compared by the digests of their regions."""

from __future__ import annotations

import pytest
import torch

from rdt_core.digest import RegionDigest, check_replicas, digest_bytes, digest_region
from rdt_core.errors import ReplicaMismatchError
from rdt_core.region import Region

ROWS = Region((2, 0), (4, 3))


def digest_of(data: torch.Tensor, region: Region = ROWS) -> RegionDigest:
    """As a trainer rank digests a region of a [8, 3] tensor."""
    digest = digest_region(data, region, (8, 3))
    return RegionDigest(tensor="w", start=region.start, stop=region.stop, dtype="float32", digest=digest)


def test_equal_replicas_and_different_regions_pass() -> None:
    data = torch.arange(6.0).reshape(2, 3)
    others = digest_of(data + 1, Region((0, 0), (2, 3)))
    check_replicas({0: [digest_of(data)], 1: [others], 2: [digest_of(data.clone())]})


def test_two_ranks_with_different_bytes_of_one_region_are_named() -> None:
    data = torch.arange(6.0).reshape(2, 3)
    changed = data.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    with pytest.raises(ReplicaMismatchError) as caught:
        check_replicas({0: [digest_of(data)], 3: [digest_of(data)], 5: [digest_of(changed)]})
    assert (caught.value.tensor, caught.value.region) == ("w", "[2:4, 0:3]")
    assert (caught.value.rank, caught.value.other_rank) == (0, 5)


@pytest.mark.parametrize(("num_rows", "row_nbytes"), [(5, 24), (1000, 7), (3, 100_001), (70_001, 130)])
def test_rows_that_lie_apart_have_the_digest_of_their_bytes_end_to_end(
    num_rows: int, row_nbytes: int
) -> None:
    memory = torch.randint(0, 256, (num_rows, row_nbytes + 3), dtype=torch.uint8)
    rows = memory[:, :row_nbytes]
    digest = digest_bytes(rows)
    assert digest == digest_bytes(rows.reshape(-1))
    memory[num_rows // 2, row_nbytes] ^= 1  # between two rows
    assert digest == digest_bytes(rows)
    memory[num_rows // 2, row_nbytes - 1] ^= 1
    assert digest != digest_bytes(rows)
