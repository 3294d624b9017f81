"""OpenTelemetry spans, when the application has OpenTelemetry; nothing otherwise.

The driver opens one span a sync. Its context travels to the engines as a W3C ``traceparent`` in the control
payloads, so that what the engine ranks do appears in the same trace. Nobody here configures an exporter:
that is the application's part.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    named = {f"rdt.{key}": value for key, value in attributes.items()}
    tracer = trace.get_tracer(_TRACER)
    with tracer.start_as_current_span(name, context=_context_of(parent), attributes=named):
        yield


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


def _context_of(parent: str) -> Any:
    propagation = _api("opentelemetry.trace.propagation.tracecontext")
    if not parent or propagation is None:
        return None
    return propagation.TraceContextTextMapPropagator().extract({"traceparent": parent})
