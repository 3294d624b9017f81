"""Manifests as bytes: a versioned stream of msgpack values, never pickle.

A message is a flat sequence of small values (strings, integers and short arrays of integers), so that a
length prefix in hostile bytes can never make the reader allocate more than a small multiple of what was sent.
Names and dtypes are written once and shards refer to them by number. Equal manifests have equal bytes, in
whatever order their mappings were filled.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

import msgpack

from rdt_core.collection import paused_collection
from rdt_core.errors import WireFormatError
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window, find_fault
from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterator

_T = TypeVar("_T")

MAGIC = "rdt-manifest"
FORMAT_VERSION = 2
MAX_MANIFEST_NBYTES = 64 * 2**20
MAX_DIMS = 16
MAX_NAME_NBYTES = 4096
MAX_INT = 2**63 - 1

_SHARD_HEADER = 4  # tensor, window, dtype, offset; then start, stop and stride of every dim
_MAX_SHARD_INTS = _SHARD_HEADER + 3 * MAX_DIMS


@paused_collection()
def manifest_to_bytes(manifest: Manifest) -> bytes:
    """The manifest's canonical bytes. Called at attach and connect, on every rank of either side.

    Raises:
        WireFormatError: the manifest contradicts itself or is too large; nothing that
            :func:`manifest_from_bytes` refuses is ever sent.
        UnknownDtypeError: a dtype is not one that this project moves.
    """
    fault = find_fault(manifest)
    if fault is not None:
        raise WireFormatError("manifest", fault)
    packer = msgpack.Packer()
    try:
        data = b"".join([packer.pack(_check_limits(value)) for value in _values_of(manifest)])
    except UnicodeEncodeError as error:
        raise WireFormatError("manifest", f"a name is not valid text ({error})") from None
    if len(data) > MAX_MANIFEST_NBYTES:
        raise WireFormatError("manifest", f"{len(data)} bytes exceed the limit of {MAX_MANIFEST_NBYTES}")
    return data


@paused_collection()
def manifest_from_bytes(data: bytes) -> Manifest:
    """The manifest that :func:`manifest_to_bytes` wrote, checked throughout. Safe on bytes from anyone.

    Raises:
        WireFormatError: the bytes are not a manifest of this format version, or it contradicts itself.
        UnknownDtypeError: a dtype is not one that this project moves.
    """
    if len(data) > MAX_MANIFEST_NBYTES:
        raise WireFormatError("manifest", f"{len(data)} bytes exceed the limit of {MAX_MANIFEST_NBYTES}")
    manifest = _Reader(data).read_manifest()
    fault = find_fault(manifest)
    if fault is not None:
        raise WireFormatError("manifest", fault)
    return manifest


def manifest_digest(manifest: Manifest) -> str:
    """Names what a manifest says in 32 hex digits: equal manifests have equal digests.

    Raises:
        WireFormatError, UnknownDtypeError: as :func:`manifest_to_bytes`.
    """
    return hashlib.blake2b(manifest_to_bytes(manifest), digest_size=16).hexdigest()


def _check_limits(value: str | int | tuple[int, ...]) -> str | int | tuple[int, ...]:
    """The value, if the reader will take it."""
    if isinstance(value, tuple):
        fits = max(value) <= MAX_INT and len(value) <= _MAX_SHARD_INTS
    elif isinstance(value, str):
        # No character takes more than four bytes.
        fits = len(value) <= MAX_NAME_NBYTES // 4 or len(value.encode()) <= MAX_NAME_NBYTES
    else:
        fits = value <= MAX_INT
    if not fits:
        raise WireFormatError("manifest", f"{str(value)[:100]!r} exceeds the format's limits")
    return value


def _values_of(manifest: Manifest) -> Iterator[str | int | tuple[int, ...]]:
    windows, tensors = sorted(manifest.windows), sorted(manifest.tensors)
    dtypes = sorted(
        {spec.dtype for spec in manifest.tensors.values()} | {shard.dtype for shard in manifest.shards}
    )
    window_at = {name: index for index, name in enumerate(windows)}
    if any(len(spec.shape) > MAX_DIMS for spec in manifest.tensors.values()):
        raise WireFormatError("manifest", f"a tensor has more than {MAX_DIMS} dims")
    tensor_at = {name: index for index, name in enumerate(tensors)}
    dtype_at = {name: index for index, name in enumerate(dtypes)}
    yield MAGIC
    yield FORMAT_VERSION
    yield from (manifest.side, manifest.rank, manifest.world_size, manifest.node, manifest.device)
    yield len(manifest.transports)
    yield from manifest.transports
    yield len(dtypes)
    yield from dtypes
    yield len(windows)
    for name in windows:
        yield name
        yield manifest.windows[name].nbytes
    yield len(tensors)
    for name in tensors:
        yield name
        yield (dtype_at[manifest.tensors[name].dtype], *manifest.tensors[name].shape)
    yield len(manifest.shards)
    for shard in manifest.shards:
        yield (
            tensor_at[shard.tensor],
            window_at[shard.window],
            dtype_at[shard.dtype],
            shard.offset_bytes,
            *shard.region.start,
            *shard.region.stop,
            *shard.stride_bytes,
        )


class _Reader:
    """Reads the values of one message in order, each of the type that its place asks for."""

    def __init__(self, data: bytes) -> None:
        self._nbytes = len(data)
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=max(len(data), 1),
            max_str_len=MAX_NAME_NBYTES,
            max_array_len=_MAX_SHARD_INTS,
            max_bin_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
        self._unpacker.feed(data)

    def read_manifest(self) -> Manifest:
        if self._read_text("format name") != MAGIC:
            raise WireFormatError("manifest", f"it does not begin with {MAGIC!r}")
        version = self._read_int("format version")
        if version != FORMAT_VERSION:
            raise WireFormatError("manifest", f"format version {version}, expected {FORMAT_VERSION}")
        side, rank, world_size = self._read_text("side"), self._read_int("rank"), self._read_int("world size")
        node, device = self._read_text("node"), self._read_text("device")
        transports = [self._read_text("transport") for _ in range(self._read_int("number of transports"))]
        dtypes = [self._read_text("dtype") for _ in range(self._read_int("number of dtypes"))]
        windows = [self._read_window() for _ in range(self._read_int("number of windows"))]
        tensors = [self._read_spec(dtypes) for _ in range(self._read_int("number of tensors"))]
        shards = [
            self._read_shard(tensors, windows, dtypes) for _ in range(self._read_int("number of shards"))
        ]
        if self._unpacker.tell() != self._nbytes:
            raise WireFormatError("manifest", "more bytes follow its end")
        self._refuse_doubles("windows", [window.name for window in windows])
        self._refuse_doubles("tensors", [spec.name for spec in tensors])
        return Manifest(
            side=side,
            rank=rank,
            world_size=world_size,
            node=node,
            device=device,
            transports=tuple(transports),
            windows={window.name: window for window in windows},
            tensors={spec.name: spec for spec in tensors},
            shards=tuple(shards),
        )

    def _read_window(self) -> Window:
        return Window(self._read_text("window"), self._read_int("window size"))

    def _read_spec(self, dtypes: list[str]) -> TensorSpec:
        name = self._read_text("tensor")
        values = self._read_ints("tensor")
        if not 1 <= len(values) <= 1 + MAX_DIMS:
            raise WireFormatError("manifest", f"tensor {name!r} has {len(values) - 1} dims")
        return TensorSpec(name, tuple(values[1:]), self._look_up(dtypes, values[0]))

    def _read_shard(self, tensors: list[TensorSpec], windows: list[Window], dtypes: list[str]) -> Shard:
        values = self._read_ints("shard")
        num_dims, rest = divmod(len(values) - _SHARD_HEADER, 3)
        if rest or num_dims < 0:
            raise WireFormatError("manifest", f"a shard of {len(values)} numbers")
        bounds = _SHARD_HEADER + num_dims
        try:
            region = Region(tuple(values[_SHARD_HEADER:bounds]), tuple(values[bounds : bounds + num_dims]))
        except ValueError as error:
            raise WireFormatError("manifest", f"a region is malformed ({error})") from None
        return Shard(
            tensor=self._look_up(tensors, values[0]).name,
            region=region,
            window=self._look_up(windows, values[1]).name,
            offset_bytes=values[3],
            stride_bytes=tuple(values[bounds + num_dims :]),
            dtype=self._look_up(dtypes, values[2]),
        )

    def _read(self, what: str) -> object:
        try:
            return self._unpacker.unpack()
        except msgpack.OutOfData:
            raise WireFormatError("manifest", f"it ends before its {what}") from None
        except (ValueError, msgpack.UnpackException) as error:
            raise WireFormatError("manifest", f"its {what} is not valid msgpack ({error})") from None

    def _read_text(self, what: str) -> str:
        value = self._read(what)
        if not isinstance(value, str):
            raise WireFormatError("manifest", f"its {what} is of type {type(value).__name__}, expected text")
        return value

    def _read_int(self, what: str) -> int:
        return self._check_int(what, self._read(what))

    def _read_ints(self, what: str) -> list[int]:
        value = self._read(what)
        if not isinstance(value, list):
            raise WireFormatError(
                "manifest", f"its {what} is of type {type(value).__name__}, expected numbers"
            )
        return [self._check_int(what, item) for item in value]

    @staticmethod
    def _check_int(what: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INT:
            raise WireFormatError("manifest", f"its {what} is not a number from 0 to 2**63 - 1")
        return value

    @staticmethod
    def _look_up(items: list[_T], index: int) -> _T:
        if index >= len(items):
            raise WireFormatError("manifest", f"number {index} refers to none of {len(items)} items")
        return items[index]

    @staticmethod
    def _refuse_doubles(what: str, names: list[str]) -> None:
        if len(set(names)) != len(names):
            raise WireFormatError("manifest", f"two of its {what} have one name")
