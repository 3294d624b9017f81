"""Digests of tensors that can be computed shard by shard and added up.

The digest of a tensor is the sum, modulo 2**64, of one mixed word for every element; the word depends on
the element's bits and on its index in the *global* tensor. So every rank digests what it holds, in place,
whatever the sharding, and two sides that cut a tensor differently still agree when and only when (up to
chance, 2**-64) every element is equal. It guards against mistakes, not against an adversary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rdt_core.errors import ReplicaMismatchError
from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_CHUNK_ELEMENTS = 1 << 20
_WORD = (1 << 64) - 1
_INT_OF_ITEMSIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionDigest:
    """The digest of one region, as one rank holds it.

    Args:
        tensor: checkpoint name.
        start: of the region.
        stop: of the region.
        dtype: the bits that were digested.
        digest: the sum over the region's elements, modulo 2**64.
    """

    tensor: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    dtype: str
    digest: int

    @property
    def num_elements(self) -> int:
        """Elements of the region."""
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))


def digest_region(data: torch.Tensor, region: Region, shape: Sequence[int]) -> int:
    """Digest the elements of one region where they lie. Reads every element; allocates a few MiB.

    Args:
        data: a view of the region's elements, of shape ``region.shape`` and any strides.
        region: which box of the tensor it is.
        shape: the tensor's GLOBAL shape, in elements.
    """
    if data.dim() == 0:
        return digest_region(data.reshape(1), _as_vector(region), (1,))
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    inner = data[0].numel() if data.shape[0] else 0
    if not inner:
        return 0
    rows = max(1, _CHUNK_ELEMENTS // inner)
    index_of_row = _indices(data.shape[1:], region.start[1:], strides[1:], data.device)
    total = 0
    for first in range(0, data.shape[0], rows):
        part = data[first : first + rows].contiguous()
        leading = torch.arange(first, first + part.shape[0], device=data.device) + region.start[0]
        indices = (leading * strides[0]).unsqueeze(1) + index_of_row.unsqueeze(0)
        total += _sum_of_words(part.view(part.shape[0], -1), indices)
    return total & _WORD


def digest_bytes(data: torch.Tensor) -> int:
    """Digest the bytes of a uint8 tensor, flat or rows laid end to end, whatever its alignment.

    Reads all; allocates a few MiB, or eight rows where these are longer.
    """
    rows = data if data.dim() > 1 else data.view(-1, 1)
    # Every chunk but the last is made of whole words.
    step = max(8, 8 * _CHUNK_ELEMENTS // max(rows.shape[1], 1) // 8 * 8)
    total = 0
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step].reshape(-1)
        words = torch.zeros(-(-part.numel() // 8), dtype=torch.int64, device=data.device)
        words.view(torch.uint8)[: part.numel()].copy_(part)
        numbers = torch.arange(words.numel(), device=data.device) + first * rows.shape[1] // 8
        total += _sum_of_words(words, numbers)
    return total & _WORD


def add_digests(parts: Iterable[RegionDigest]) -> dict[str, tuple[int, int, bool]]:
    """Sum region digests into tensor digests.

    Returns:
        By tensor: its digest, the number of elements it was summed over, and whether all replicas (equal
        regions) had equal digests.
    """
    regions: dict[tuple[str, tuple[int, ...], tuple[int, ...]], RegionDigest] = {}
    torn: set[str] = set()
    for part in parts:
        first = regions.setdefault((part.tensor, tuple(part.start), tuple(part.stop)), part)
        if first.digest != part.digest:
            torn.add(part.tensor)
    sums: dict[str, tuple[int, int, bool]] = {}
    for part in regions.values():
        digest, num_elements, _ = sums.get(part.tensor, (0, 0, True))
        sums[part.tensor] = (
            (digest + part.digest) & _WORD,
            num_elements + part.num_elements,
            part.tensor not in torn,
        )
    return sums


def check_replicas(by_rank: Mapping[int, Sequence[RegionDigest]]) -> None:
    """That trainer ranks which hold one region hold the same bytes. Called by the driver's ``verify``.

    Raises:
        ReplicaMismatchError: two do not.
    """
    first: dict[tuple[str, Region], tuple[int, int]] = {}
    for rank, digests in sorted(by_rank.items()):
        for held in digests:
            region = Region(tuple(held.start), tuple(held.stop))
            other_rank, digest = first.setdefault((held.tensor, region), (rank, held.digest))
            if digest != held.digest:
                raise ReplicaMismatchError(held.tensor, str(region), other_rank, rank)


def _as_vector(region: Region) -> Region:
    return type(region)((0,), (1,))


def _indices(
    shape: Sequence[int], start: Sequence[int], strides: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Flat global indices of a box's elements, without the leading dim's part."""
    indices = torch.zeros(1, dtype=torch.int64, device=device)
    for size, first, stride in zip(shape, start, strides, strict=True):
        along = (torch.arange(size, device=device) + first) * stride
        indices = (indices.unsqueeze(1) + along.unsqueeze(0)).view(-1)
    return indices


def _sum_of_words(data: torch.Tensor, indices: torch.Tensor) -> int:
    bits = data.view(_INT_OF_ITEMSIZE[data.element_size()]).to(torch.int64)
    words = _mix(_mix(indices) ^ bits)
    return int(words.sum().item())


def _mix(words: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit words that spreads every bit (xor-shifts and odd multipliers), elementwise."""
    words = words * -7046029254386353131
    words = words ^ ((words >> 32) & 0xFFFFFFFF)
    words = words * -4417276706812531889
    return words ^ ((words >> 29) & 0x7FFFFFFFF)
