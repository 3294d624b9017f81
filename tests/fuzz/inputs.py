"""Malformed input: what a peer could send by mistake, and what somebody would send on purpose."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import msgpack
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Sequence

NUMBERS: tuple[float, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 2**16, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
)
WORDS = (
    "",
    "rdt-manifest",
    "trainer",
    "engine",
    "float32",
    "bfloat16",
    "float8",
    "w",
    "cpu",
    "memory",
    "\x00",
)

numbers = st.sampled_from(NUMBERS) | st.integers(-(2**63), 2**64 - 1) | st.floats()
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | st.sampled_from(WORDS)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=10), inner, max_size=6),
    max_leaves=20,
)
"""Anything that JSON or msgpack can carry, small."""

seeds = st.integers(0, 2**32 - 1)


def requests(*fields: str) -> st.SearchStrategy[dict[str, Any]]:
    """A JSON object with some of these fields, each holding anything, and perhaps others."""
    known = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, plain_values))
    return st.builds(
        lambda some, more: {**more, **some},
        known,
        st.dictionaries(st.text(max_size=8), plain_values, max_size=2),
    )


def damage(data: bytes, seed: int) -> bytes:
    """Bytes with a few of them changed, cut out, doubled, or cut off."""
    dice = random.Random(seed)  # noqa: S311  reproducible damage, no secret
    found = bytearray(data)
    for _ in range(dice.randint(1, 6)):
        at = dice.randrange(len(found) + 1)
        match dice.randrange(5):
            case 0:
                found[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                found[at : at + dice.randint(1, 8)] = b""
            case 2:
                found[at:at] = dice.randbytes(dice.randint(1, 8))
            case 3:
                found[at:at] = found[at : at + dice.randint(1, 32)]
            case _:
                del found[max(at, 1) :]
    return bytes(found)


def damage_values(values: Sequence[Any], seed: int) -> bytes:
    """A msgpack stream with a few of its values replaced: it parses, and what it says is wrong."""
    dice = random.Random(seed)  # noqa: S311  reproducible damage, no secret
    found = list(values)
    for _ in range(dice.randint(1, 2)):
        at = dice.randrange(len(found))
        value = found[at]
        if isinstance(value, list) and value:
            value = list(value)
            value[dice.randrange(len(value))] = _other(dice, value[0])
            found[at] = value
        elif dice.randrange(10):
            found[at] = _other(dice, value)
        else:
            del found[at]
    packer = msgpack.Packer()
    return b"".join(packer.pack(value) for value in found)


def _other(dice: random.Random, value: object) -> object:
    if isinstance(value, str):
        return dice.choice(WORDS)
    if isinstance(value, int):
        return dice.choice(
            (value + 1, value * 2, max(0, value - 1), dice.randrange(2**20), 2**62, 2**63 - 1, 0)
        )
    return dice.randrange(100)
