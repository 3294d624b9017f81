from __future__ import annotations

import itertools

import pytest

from rdt_core.dtypes import CONVERTIBLE, ITEMSIZE_BYTES, is_convertible, itemsize_bytes
from rdt_core.errors import UnknownDtypeError


@pytest.mark.parametrize(("dtype", "expected"), [("bool", 1), ("bfloat16", 2), ("float32", 4), ("int64", 8)])
def test_an_element_has_its_size_in_bytes(dtype: str, expected: int) -> None:
    assert itemsize_bytes(dtype) == expected


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "", "complex64", "float4"])
def test_an_unknown_dtype_is_named_in_the_error(dtype: str) -> None:
    with pytest.raises(UnknownDtypeError) as caught:
        itemsize_bytes(dtype)
    assert caught.value.dtype == dtype
    assert repr(dtype) in str(caught.value)


def test_only_floats_of_sixteen_and_thirty_two_bits_convert_into_each_other() -> None:
    for source, target in itertools.permutations(ITEMSIZE_BYTES, 2):
        assert is_convertible(source, target) == ({source, target} <= CONVERTIBLE)


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE_BYTES))
def test_every_dtype_lands_in_itself(dtype: str) -> None:
    assert is_convertible(dtype, dtype)


def test_every_convertible_dtype_has_a_size() -> None:
    assert set(ITEMSIZE_BYTES) >= CONVERTIBLE
