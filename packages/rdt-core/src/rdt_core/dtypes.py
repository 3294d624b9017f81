"""Element types by name, their sizes, and which may be converted into which while landing.

Names are torch's own without the prefix (``bfloat16``), so that the pure half can speak of them
without importing torch.
"""

from __future__ import annotations

from rdt_core.errors import UnknownDtypeError

ITEMSIZE_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}

# Rounding or widening between these is what every engine's own loader does with ``copy_``. Eight-bit
# floats are absent on purpose: without their scales a conversion is a different number.
CONVERTIBLE = frozenset({"float16", "bfloat16", "float32"})


def itemsize_bytes(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        UnknownDtypeError: the name is not in ``ITEMSIZE_BYTES``.
    """
    try:
        return ITEMSIZE_BYTES[dtype]
    except KeyError:
        raise UnknownDtypeError(dtype) from None


def is_convertible(source: str, target: str) -> bool:
    """Whether bytes of dtype ``source`` may land in a parameter of dtype ``target``."""
    return source == target or (source in CONVERTIBLE and target in CONVERTIBLE)
