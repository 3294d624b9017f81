"""OpenTelemetry spans, when the application has OpenTelemetry; nothing otherwise.

The driver opens one span a sync. Its context travels as a W3C ``traceparent``: to the engines in the control
payloads, to the coordinator beside every call, and from there to the trainer ranks with their tasks. So what
all of them do for one version appears in one trace. Nobody here configures an exporter: that is the
application's part.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TRACER = "rdt_core"
MAX_TRACEPARENT = 64
"""A version-00 traceparent has 55 characters; whatever is longer is not one."""


@functools.cache
def _api(module: str) -> Any:
    """A module of OpenTelemetry's API or SDK, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


@contextlib.contextmanager
def span(name: str, *, parent: str = "", **attributes: str | float) -> Iterator[None]:
    """Run the body inside a span; an error that leaves the body is recorded on it.

    Args:
        name: of the span, ``"rdt.prepare"``.
        parent: a ``traceparent`` from another process; by default the span that is open in this thread.
        attributes: shown with the span, under ``rdt.<key>``.
    """
    trace = _api("opentelemetry.trace")
    if trace is None:
        yield
        return
    tracer = _tracer(trace)
    with tracer.start_as_current_span(name, context=_context_of(parent), attributes=_named(attributes)):
        yield


@contextlib.contextmanager
def continued(name: str, parent: str, **attributes: str | float) -> Iterator[None]:
    """Run the body inside a span of another process's trace; outside of any when ``parent`` is empty."""
    if not parent:
        yield
        return
    with span(name, parent=parent, **attributes):
        yield


def record_span(
    name: str, started_unix_ns: int, ended_unix_ns: int, *, parent: str, **attributes: str | float
) -> None:
    """Add a span of what was done before anybody said which trace it belongs to.

    Args:
        name: of the span.
        started_unix_ns: when it began, by this host's clock.
        ended_unix_ns: when it was done.
        parent: the ``traceparent`` that has come since; without one nothing is recorded.
        attributes: as for :func:`span`.
    """
    trace = _api("opentelemetry.trace")
    if trace is None or not parent:
        return
    done = _tracer(trace).start_span(
        name, context=_context_of(parent), start_time=started_unix_ns, attributes=_named(attributes)
    )
    done.end(ended_unix_ns)


def traceparent() -> str:
    """The open span of this thread in W3C form, to be sent to another process; empty when there is none."""
    propagation = _api("opentelemetry.trace.propagation.tracecontext")
    if propagation is None:
        return ""
    carrier: dict[str, str] = {}
    propagation.TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def parse_traceparent(payload: object) -> str:
    """The traceparent of a control payload; empty for anything that cannot be one. Never raises."""
    value = payload.get("traceparent") if isinstance(payload, dict) else None
    return value if isinstance(value, str) and len(value) <= MAX_TRACEPARENT else ""


class _UnseededIds:
    """Ids for spans, in the place of the SDK's own generator.

    That draws from ``random``, which an engine seeds alike in every rank: two ranks then give their spans the
    same ids, in the same trace.
    """

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def generate_span_id(self) -> int:
        """64 bits, not 0."""
        return self._random.getrandbits(64) or 1

    def generate_trace_id(self) -> int:
        """128 bits, not 0."""
        return self._random.getrandbits(128) or 1

    def is_trace_id_random(self) -> bool:
        """As the W3C means it: all bits are."""
        return True


_ids = _UnseededIds()


def _tracer(trace: Any) -> Any:
    """Our tracer of the provider that is set now. An application's own id generator stays."""
    tracer = trace.get_tracer(_TRACER)
    sdk = _api("opentelemetry.sdk.trace.id_generator")
    if sdk is not None and type(getattr(tracer, "id_generator", None)) is sdk.RandomIdGenerator:
        tracer.id_generator = _ids
    return tracer


def _named(attributes: Mapping[str, str | float]) -> dict[str, str | float]:
    return {f"rdt.{key}": value for key, value in attributes.items()}


def _context_of(parent: str) -> Any:
    propagation = _api("opentelemetry.trace.propagation.tracecontext")
    if not parent or propagation is None:
        return None
    return propagation.TraceContextTextMapPropagator().extract({"traceparent": parent})
