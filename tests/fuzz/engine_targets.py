"""Targets behind torch: an engine rank's control methods, and what a trainer rank exports on request."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st

from rdt_core import engine_rpc
from rdt_core.engine_routes import parse_body
from rdt_core.error_wire import from_wire
from rdt_core.errors import RdtError
from rdt_core.exports import Exports
from tests.contract.world import Engine, make_world
from tests.fuzz.inputs import damage, plain_values, requests, seeds
from tests.fuzz.targets import Target, answer_of

if TYPE_CHECKING:
    from collections.abc import Iterator

METHODS = ("abort", "commit", "connect", "digest", "disconnect", "lend", "prepare", "reclaim", "status", "x")
EXPORT_METHODS = ("probe", "open", "digest", "drop")
WINDOW_NBYTES = 256
TIMEOUT_S = 0.05


@contextlib.contextmanager
def make_engine_targets() -> Iterator[list[Target]]:
    """Targets on a living group in this process; it ends with the context."""
    world = make_world()
    engine = Engine(world.channel)
    engine.connect(transport="memory")
    world.publish(1)
    engine.subscriber.prepare(1)
    engine.subscriber.commit(1)
    exports = Exports({"w": torch.zeros(WINDOW_NBYTES, dtype=torch.uint8)}, "cpu", 0)
    try:
        yield [
            Target("engine rank, control call", _calls(), lambda call: _call(engine, *call)),
            Target(
                "trainer rank, export request",
                _export_requests(),
                answer_of(lambda asked: getattr(exports, asked[0])(asked[1])),
            ),
            Target("control request, fields", _control_requests(), answer_of(_parse_request)),
            Target("route, body", _bodies(), answer_of(parse_body)),
        ]
    finally:
        exports.close()
        engine.subscriber.disconnect()
        world.close()


def _calls() -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    fields = (
        *("group", "engine", "transport", "mode", "arenas", "lender", "lent_version", "ray_address"),
        *("version", "attempt", "verify", "traceparent", "kv_cache"),
    )
    return st.tuples(st.sampled_from(METHODS), requests(*fields))


def _call(engine: Engine, method: str, payload: dict[str, Any]) -> RdtError | None:
    """A control call in the thread that runs the model."""
    if engine.subscriber.status()["group"] is None:
        engine.connect(transport="memory")
    answer = engine_rpc.call(engine.subscriber, method, {**payload, "timeout_s": TIMEOUT_S})
    return None if answer["ok"] else from_wire(answer["error"])


def _export_requests() -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    window, number = st.sampled_from(("w", "arena:", "x")), st.integers(-8, 300)
    rows = st.tuples(window, number, st.integers(-1, 40), st.integers(-1, 12), st.integers(-1, 64))
    ranges = st.lists(st.tuples(window, number, number) | rows, max_size=4)
    item = st.tuples(
        st.sampled_from(("w", "x")),
        st.integers(-4, 300),
        st.lists(st.integers(-1, 40), max_size=3),
        st.lists(st.integers(-4, 64), max_size=3),
        st.sampled_from(("float32", "bfloat16", "x")),
        st.sampled_from(("float32", "bfloat16", "x")),
    )
    likely = st.fixed_dictionaries(
        {
            "reader": st.just("a#0"),
            "transport": st.sampled_from(("memory", "x")),
            "secret": st.text(max_size=4),
            "version": st.sampled_from((1, 2, 3)),
            "ranges": ranges | plain_values,
            "arena": st.lists(item, max_size=2) | plain_values,
            "pieces": st.lists(st.integers(-1, 4), max_size=3) | plain_values,
        }
    )
    anything = requests("reader", "transport", "secret", "version", "ranges", "arena", "pieces")
    return st.tuples(st.sampled_from(EXPORT_METHODS), likely | anything)


def _bodies() -> st.SearchStrategy[bytes]:
    whole = b'{"group": "policy", "version": 3, "timeout_s": 1.5, "more": [1, {"a": null}]}'
    deep = st.integers(1, 30_000).map(lambda depth: b"[" * depth)
    return st.binary(max_size=100) | st.builds(damage, st.just(whole), seeds) | deep


def _control_requests() -> st.SearchStrategy[dict[str, Any]]:
    return requests(
        "group", "engine", "ray_address", "transport", "mode", "arenas", "lender", "lent_version",
        "timeout_s", "version", "verify",
    )  # fmt: skip


def _parse_request(payload: dict[str, Any]) -> None:
    """Every parser sees every payload; the last one's error is what counts."""
    for parse in (engine_rpc.parse_version, engine_rpc.parse_timeout, engine_rpc.parse_verify):
        with contextlib.suppress(RdtError):
            parse(payload)
    engine_rpc.parse_connect(payload)
