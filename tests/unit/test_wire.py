from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdt_core import wire
from rdt_core.errors import UnknownDtypeError, WireFormatError
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.region import Region
from rdt_core.wire import manifest_digest, manifest_from_bytes, manifest_to_bytes
from tests.unit.strategies import manifests
from tests.unit.worlds_by_hand import box, holding

if TYPE_CHECKING:
    from random import Random

GOOD = holding(box((0, 2), (0, 4)), box((2, 4), (0, 4)), shape=(4, 4))


def values_of(data: bytes) -> list[Any]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    return list(unpacker)


def bytes_of(values: list[object]) -> bytes:
    return b"".join(map(msgpack.packb, values))


def expect_refusal(data: bytes) -> None:
    """Either a valid manifest, or one of the two documented errors, comes of any bytes."""
    try:
        manifest = manifest_from_bytes(data)
    except (WireFormatError, UnknownDtypeError):
        return
    assert manifest_from_bytes(manifest_to_bytes(manifest)) == manifest


@given(manifests())
def test_a_manifest_survives_the_trip(manifest: Manifest) -> None:
    again = manifest_from_bytes(manifest_to_bytes(manifest))
    assert again == manifest
    assert manifest_to_bytes(again) == manifest_to_bytes(manifest)


@given(manifests(), st.randoms(use_true_random=False))
def test_equal_manifests_have_equal_digests_in_whatever_order_they_were_filled(
    manifest: Manifest, random: Random
) -> None:
    windows, tensors = list(manifest.windows.items()), list(manifest.tensors.items())
    random.shuffle(windows)
    random.shuffle(tensors)
    again = dataclasses.replace(manifest, windows=dict(windows), tensors=dict(tensors))
    assert again == manifest
    assert manifest_digest(again) == manifest_digest(manifest)


@given(manifests(), manifests())
def test_different_manifests_have_different_digests(one: Manifest, other: Manifest) -> None:
    assert (manifest_digest(one) == manifest_digest(other)) == (one == other)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 1},
        {"world_size": 17},
        {"node": "node1"},
        {"device": "cuda:0"},
        {"transports": ("nixl",)},
        {"side": "engine"},
        {"windows": {"w": Window("w", 33)}},
        {"shards": GOOD.shards[::-1]},
        {"shards": GOOD.shards[:1]},
        {"tensors": {**GOOD.tensors, "x": TensorSpec("x", (1,), "int8")}},
    ],
)
def test_every_field_of_a_manifest_changes_its_digest(changes: dict[str, Any]) -> None:
    assert manifest_digest(dataclasses.replace(GOOD, **changes)) != manifest_digest(GOOD)


def test_the_digest_of_a_known_manifest_stays_what_it_was() -> None:
    # A change of this value is a change of the format: raise FORMAT_VERSION with it.
    assert manifest_digest(GOOD) == "1604ff89815dc59d941e80e899e450c4"


@given(st.binary(max_size=200))
@example(b"")
@example(msgpack.packb(wire.MAGIC))
def test_any_bytes_are_a_manifest_or_an_error_of_ours(data: bytes) -> None:
    expect_refusal(data)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4)
msgpack_values = st.recursive(
    scalars | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


@given(manifests(), st.data())
@settings(max_examples=200)
def test_a_manifest_with_values_replaced_dropped_or_doubled_is_refused_or_still_one(
    manifest: Manifest, data: st.DataObject
) -> None:
    values = values_of(manifest_to_bytes(manifest))
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(values) - 1))
        if isinstance(values[index], list) and values[index] and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(values[index]) - 1))
            values[index][at] = data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 9) | scalars)
        else:
            values[index : index + 1] = data.draw(st.lists(msgpack_values | st.integers(0, 9), max_size=2))
        if not values:
            break
    expect_refusal(bytes_of(values))


@given(manifests(), st.data())
@settings(max_examples=200)
def test_a_manifest_with_bytes_flipped_cut_or_added_is_refused_or_still_one(
    manifest: Manifest, data: st.DataObject
) -> None:
    raw = bytearray(manifest_to_bytes(manifest))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    expect_refusal(bytes(raw))


@given(manifests(), st.data())
def test_every_proper_prefix_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    raw = manifest_to_bytes(manifest)
    with pytest.raises(WireFormatError):
        manifest_from_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])


def replaced(index: int, value: object) -> bytes:
    values = values_of(manifest_to_bytes(GOOD))
    values[index] = value
    return bytes_of(values)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (replaced(0, "rdt-plan"), "does not begin with 'rdt-manifest'"),
        (replaced(1, 1), "format version 1, expected 2"),
        (replaced(1, True), "format version is not a number"),
        (replaced(3, -1), "rank is not a number"),
        (replaced(3, 99), "rank 99 is not one of 16"),
        (replaced(2, "driver"), "side is 'driver'"),
        (replaced(5, b"node0"), "valid msgpack"),
        (replaced(7, 2**62), "expected text"),
        (replaced(-1, [0, 0, 0, 16, 2, 0, 5, 4, 8, 2]), "outside of its shape"),
        (replaced(-1, [0, 0, 0, 18, 2, 0, 4, 4, 8, 2]), "beyond the 32 bytes"),
        (replaced(-1, [0, 0, 0, 16, 4, 0, 2, 4, 8, 2]), "region is malformed"),
        (replaced(-1, [1, 0, 0, 16, 2, 0, 4, 4, 8, 2]), "refers to none of 1"),
        (replaced(-1, [0, 0, 0, 16, 2, 0, 4, 4, 8]), "shard of 9 numbers"),
        (replaced(-1, [0, 0]), "shard of 2 numbers"),
        (replaced(-1, [0, 0, 0, 2**63, 2, 0, 4, 4, 8, 2]), "2**63"),
        (replaced(-1, [0] * 1000), "valid msgpack"),
        (manifest_to_bytes(GOOD) + b"\x00", "more bytes follow"),
        (b"\xdd\xff\xff\xff\xff" * 50, "valid msgpack"),
        (b"\x91" * 100_000, "valid msgpack"),
        (b"\xdb\x7f\xff\xff\xff", "its format name"),
        (b"\xc1", "valid msgpack"),
        (b"\xa2\xff\xff", "valid msgpack"),
    ],
)
def test_a_refusal_says_what_is_wrong(data: bytes, expected: str) -> None:
    with pytest.raises(WireFormatError) as caught:
        manifest_from_bytes(data)
    assert expected in str(caught.value)


def test_an_unknown_dtype_on_the_wire_is_named() -> None:
    with pytest.raises(UnknownDtypeError, match="float3"):
        manifest_from_bytes(replaced(9, "float3"))


def test_two_windows_of_one_name_are_refused() -> None:
    values = values_of(
        manifest_to_bytes(dataclasses.replace(GOOD, windows={**GOOD.windows, "x": Window("x", 1)}))
    )
    values[values.index("x")] = "w"
    with pytest.raises(WireFormatError, match="one name"):
        manifest_from_bytes(bytes_of(values))


def test_bytes_beyond_the_limit_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = manifest_to_bytes(GOOD)
    monkeypatch.setattr(wire, "MAX_MANIFEST_NBYTES", len(raw) - 1)
    with pytest.raises(WireFormatError, match="exceed the limit"):
        manifest_from_bytes(raw)
    with pytest.raises(WireFormatError, match="exceed the limit"):
        manifest_to_bytes(GOOD)


@pytest.mark.parametrize(
    "manifest",
    [
        dataclasses.replace(GOOD, rank=16),
        dataclasses.replace(GOOD, node="n" * 5000),
        dataclasses.replace(GOOD, node="\ud800"),
        dataclasses.replace(GOOD, tensors={**GOOD.tensors, "x": TensorSpec("x", (1,) * 17, "int8")}),
        dataclasses.replace(GOOD, windows={"w": Window("w", 2**63)}),
    ],
)
def test_what_the_reader_would_refuse_is_not_written(manifest: Manifest) -> None:
    with pytest.raises(WireFormatError):
        manifest_to_bytes(manifest)


def test_a_hundred_thousand_shards_are_written_and_read_in_seconds_and_few_bytes() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.down_proj.weight" for i in range(250) for j in range(400)]
    manifest = Manifest(
        side="trainer",
        rank=0,
        world_size=1,
        node="node0",
        device="cuda:0",
        windows={"arena": Window("arena", len(names) * 4096)},
        tensors={name: TensorSpec(name, (64, 32), "bfloat16") for name in names},
        shards=tuple(
            Shard(
                tensor=name,
                region=Region((0, 0), (64, 32)),
                window="arena",
                offset_bytes=4096 * index,
                stride_bytes=(64, 2),
                dtype="bfloat16",
            )
            for index, name in enumerate(names)
        ),
    )
    began = time.process_time()
    raw = manifest_to_bytes(manifest)
    assert manifest_from_bytes(raw) == manifest
    assert time.process_time() - began < 15.0
    assert len(raw) < 80 * len(names)
