"""Where malformed input arrives. A target may raise our errors, and nothing else.

The pure ones: they need neither torch nor ray, so that the unit tests run a part of them.
"""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack
from hypothesis import strategies as st

from rdt_core.error_wire import from_wire, to_wire
from rdt_core.errors import RdtError, UpdateFailedError
from rdt_core.line import METHODS, LineServer, pack
from rdt_core.peers import GroupCoordinator
from rdt_core.planner import build_plan
from rdt_core.region import Region
from rdt_core.wire import manifest_from_bytes, manifest_to_bytes
from rdt_core.words import Outcome
from tests.fuzz.inputs import damage, damage_values, plain_values, seeds
from tests.unit.worlds_by_hand import around, box, dense_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rdt_core.manifest import Manifest

ANSWER_TIMEOUT_S = 0.02
"""How long an answer of the coordinator's line is waited for; a request may ask it to wait for others."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that takes what a peer sends.

    Args:
        name: for the table.
        inputs: what it is fed with.
        feed: takes one; returns the error that it answered, if any, and raises no error but ours.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    feed: Callable[[Any], RdtError | None]


def make_pure_targets() -> list[Target]:
    """All targets that need neither torch nor ray."""
    raw = [manifest_to_bytes(manifest) for manifest in _all_manifests()]
    values = [list(msgpack.Unpacker(io.BytesIO(data))) for data in raw]
    damaged = st.builds(damage, st.sampled_from(raw), seeds) | st.binary(max_size=200)
    wrong = st.builds(damage_values, st.sampled_from(values[:-1]), seeds)
    pairs = st.tuples(wrong, st.builds(damage_values, st.just(values[-1]), seeds) | st.just(raw[-1]))
    line = _LineTarget(raw[0])
    return [
        Target("manifest, damaged bytes", damaged, answer_of(manifest_from_bytes)),
        Target("manifest, wrong values", wrong, answer_of(manifest_from_bytes)),
        Target("plan", pairs, answer_of(_plan)),
        Target("line, damaged bytes", _damaged_calls(), line.feed),
        Target("line, wrong arguments", _wrong_calls(), line.feed),
        Target("error of an engine", plain_values | _wrong_errors(), from_wire),
    ]


def make_byte_targets() -> tuple[list[Target], list[tuple[int, bytes]]]:
    """Targets that take bytes, and good input for them as (number of the target, bytes)."""
    manifests = [manifest_to_bytes(manifest) for manifest in _all_manifests()]
    calls = [pack([method, list(args), ""]) for method, args in CALL_FIELDS.items()]
    errors = [json.dumps(wire).encode() for wire in _good_errors()]
    targets = [
        Target("manifest", st.binary(), answer_of(manifest_from_bytes)),
        Target("line", st.binary(), _LineTarget(manifests[0]).feed),
        Target("error of an engine", st.binary(), _read_error),
    ]
    samples = [(number, data) for number, many in enumerate((manifests, calls, errors)) for data in many]
    return targets, samples


def _all_manifests() -> list[Manifest]:
    trainers, engine = _world()
    return [*trainers, engine]


def _read_error(raw: bytes) -> RdtError | None:
    try:
        return from_wire(json.loads(raw))
    except ValueError:
        return None  # no JSON, which the HTTP client refuses before


def _world() -> tuple[list[Manifest], Manifest]:
    """Two trainer ranks with two tensors, by rows and by columns, and an engine that fuses them."""
    shape = (8, 16)
    shapes = {"a": shape, "b": shape}
    trainers = [
        around(
            dense_shard(box((4 * rank, 4 * rank + 4), (0, 16)), tensor="a", window="a", dtype="bfloat16"),
            dense_shard(box((0, 8), (8 * rank, 8 * rank + 8)), tensor="b", window="b", dtype="float32"),
            shapes=shapes,
            rank=rank,
            world_size=2,
        )
        for rank in range(2)
    ]
    engine = around(
        dense_shard(Region.whole(shape), tensor="a", window="ab", dtype="bfloat16"),
        dense_shard(Region.whole(shape), tensor="b", window="ab", offset=256, dtype="bfloat16"),
        shapes=shapes,
        side="engine",
        world_size=1,
    )
    return trainers, engine


def _plan(pair: tuple[bytes, bytes]) -> object:
    trainer, engine = map(manifest_from_bytes, pair)
    return build_plan(engine, [trainer])


def answer_of(act: Callable[[Any], object]) -> Callable[[Any], RdtError | None]:
    def feed(value: Any) -> RdtError | None:
        try:
            act(value)
        except RdtError as error:
            return error
        return None

    return feed


CALL_FIELDS: dict[str, tuple[object, ...]] = {
    "await_published": (1, 0.0),
    "begin_read": ("a", 0, 1, "", 1.0),
    "check_version": (1, ""),
    "drop_lease": (1,),
    "end_read": (1, 1),
    "next_tasks": (0, "another", 1),  # of the right one it would be held open for two seconds
    "publish": (0, "i", 1, 0),
    "record": ({},),
    "release": (0, "i", 0.0),
    "report_prepared": ("a", 0, "t", Outcome({"version": 1})),
    "wait_prepared": ("t", [("a", 0)], "l", 0.0),
    "wait_published": (1, 0.0),
}
"""What a call of each of the line's methods looks like."""

LENT_CALLS: tuple[tuple[object, ...], ...] = (
    ("a", "begin_read", "b", 0, 1, "", 1.0, 0.0),
    ("a", "end_read", 1, 1),
    ("a", "publish", 0, "i", 1, 0),
)
"""What calls of methods at what an engine lends look like."""


class _LineTarget:
    """The coordinator's end of its line, with a trainer rank and an engine rank in the group."""

    def __init__(self, manifest: bytes) -> None:
        self._loop = asyncio.new_event_loop()
        self._coordinator = GroupCoordinator("policy")
        self._server = LineServer(self._coordinator)
        self._loop.run_until_complete(self._coordinator.attach(0, 1, "i", manifest))
        self._loop.run_until_complete(self._coordinator.join("a", 0, {}))

    def feed(self, request: bytes) -> RdtError | None:
        """Answer one frame; a call that waits for others is given up."""
        try:
            answer = self._loop.run_until_complete(
                asyncio.wait_for(self._server.answer(request), ANSWER_TIMEOUT_S)
            )
        except TimeoutError:
            return None
        return answer if isinstance(answer, RdtError) else None


def _damaged_calls() -> st.SearchStrategy[bytes]:
    whole = [pack([method, list(args), ""]) for method, args in CALL_FIELDS.items()]
    whole += [pack(["of_lender", list(args), ""]) for args in LENT_CALLS]
    deep = st.integers(1, 3_000).map(_nested)
    return st.builds(damage, st.sampled_from(whole), seeds) | st.binary(max_size=100) | deep


def _nested(depth: int) -> bytes:
    """Tuples in tuples: every level is a few bytes, and a frame may hold a megabyte of them."""
    value = b"\x90"
    for _ in range(depth):
        value = msgpack.packb(msgpack.ExtType(1, b"\x91" + value))
    return bytes(value)


def _wrong_calls() -> st.SearchStrategy[bytes]:
    def one(method: str, right: Sequence[object]) -> st.SearchStrategy[bytes]:
        args = st.tuples(*(st.just(value) | plain_values for value in right)).map(list)
        return st.builds(lambda given: pack([method, given, ""]), args | st.lists(plain_values, max_size=6))

    lent = [one("of_lender", args) for args in LENT_CALLS]
    return st.one_of([*(one(method, CALL_FIELDS[method]) for method in sorted(METHODS)), *lent])


def _wrong_errors() -> st.SearchStrategy[Any]:
    names = st.sampled_from(sorted({sub.__name__ for sub in _all_errors(RdtError)}))
    wrong = st.fixed_dictionaries(
        {"type": names, "message": plain_values, "fields": st.lists(plain_values, max_size=6)}
    )
    return st.sampled_from(_good_errors()) | wrong


def _good_errors() -> list[dict[str, Any]]:
    return [to_wire(error) for error in (UpdateFailedError(1, "commit", "a", 0, "x"), RdtError("x"))]


def _all_errors(base: type[RdtError]) -> list[type[RdtError]]:
    return [base, *(sub for direct in base.__subclasses__() for sub in _all_errors(direct))]
