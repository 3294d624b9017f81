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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TRACER = "rdt_core"
MAX_TRACEPARENT = 64
"""A version-00 traceparent has 55 characters; whatever is longer is not one."""


@functools.cache
def _api(module: str) -> Any:
    """A module of ``opentelemetry-api``, or None where it is not installed."""
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
    tracer = trace.get_tracer(_TRACER)
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
    done = trace.get_tracer(_TRACER).start_span(
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


def _named(attributes: Mapping[str, str | float]) -> dict[str, str | float]:
    return {f"rdt.{key}": value for key, value in attributes.items()}


def _context_of(parent: str) -> Any:
    propagation = _api("opentelemetry.trace.propagation.tracecontext")
    if not parent or propagation is None:
        return None
    return propagation.TraceContextTextMapPropagator().extract({"traceparent": parent})
