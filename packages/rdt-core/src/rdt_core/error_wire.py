"""Errors in JSON: the class name and the constructor's arguments, and nothing that could run code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rdt_core.errors import RdtError

if TYPE_CHECKING:
    from collections.abc import Callable


def to_wire(error: RdtError) -> dict[str, Any]:
    """JSON-safe form of an error, for an HTTP answer: ``{"type", "message", "fields"}``."""
    return {"type": type(error).__name__, "message": error.message, "fields": list(error.fields)}


def from_wire(wire: object) -> RdtError:
    """The error that :func:`to_wire` described; a plain :class:`RdtError` when the type is unknown.

    Only classes of ``rdt_core.errors`` can be named, and only with plain values, so nothing from the network
    can run code. Takes whatever the JSON decoder gave and never raises.
    """
    content = wire if isinstance(wire, dict) else {}
    kind, message, fields = content.get("type"), content.get("message"), content.get("fields")
    if not isinstance(message, str):
        message = "unknown error"
    make: Callable[..., RdtError] | None = _ERRORS.get(kind) if isinstance(kind, str) else None
    if make is None or not isinstance(fields, list):
        return RdtError(message)
    try:
        return make(*[tuple(field) if isinstance(field, list) else field for field in fields])
    except (TypeError, ValueError, OverflowError, LookupError, AttributeError):
        # Fields of other types than the constructor's: an object cut like a list is a TypeError up to
        # Python 3.11 and a KeyError after it.
        return RdtError(message)


def _subclasses(base: type[RdtError]) -> dict[str, type[RdtError]]:
    found = {base.__name__: base}
    for sub in base.__subclasses__():
        found |= _subclasses(sub)
    return found


_ERRORS = _subclasses(RdtError)
