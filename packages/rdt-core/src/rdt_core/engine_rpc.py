"""The border between an engine's control plane and its workers' subscribers: plain values only.

Both engines carry calls to their workers by their own means (vLLM's ``collective_rpc``, SGLang's scheduler
messages). What is carried is a method name and a dict; what comes back is a dict that JSON and msgpack can
hold, whether the call succeeded or not.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from rdt_core import tracing
from rdt_core.error_wire import to_wire
from rdt_core.errors import ConfigError, RdtError, WireFormatError
from rdt_core.fan_out import AUTO, check_policy
from rdt_core.pacing import WITHOUT_REST, check_read_share
from rdt_core.subscriber import ConnectRequest, WeightSubscriber
from rdt_core.timeouts import check_timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

_TEXTS = (
    "group",
    "engine",
    "ray_address",
    "ray_auth_mode",
    "transport",
    "mode",
    "arenas",
    "fan_out",
    "lender",
)
"""Fields of a connect request that are strings."""


def call(subscriber: WeightSubscriber, method: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Run one control method on a worker's subscriber. Called in the thread that runs the model.

    Args:
        subscriber: of this worker.
        method: ``connect``, ``prepare``, ``commit``, ``abort``, ``lend``, ``reclaim``, ``disconnect``,
            ``digest`` or ``status``.
        payload: the method's arguments, as they came over the engine's own channel.

    Returns:
        ``{"ok": True, "result": ...}`` or ``{"ok": False, "error": ...}`` with the error's wire form. Never
        raises for bad input or a failed sync, so that an engine's worker loop is not disturbed.
    """
    try:
        run = _find(method)
        parent = tracing.parse_traceparent(payload)
        with tracing.span(f"rdt.engine.{method}", parent=parent, rank=subscriber.rank):
            return {"ok": True, "result": run(subscriber, payload)}
    except RdtError as error:
        return {"ok": False, "error": to_wire(error)}
    except Exception as error:
        # An engine must outlive whatever its loader, torch or nixl, whose errors have no common base, raises
        # here; the log keeps the trace.
        logger.exception("weight sync: %s failed", method)
        return {"ok": False, "error": to_wire(RdtError(f"{method} failed: {type(error).__name__}: {error}"))}


def _find(method: str) -> Callable[[WeightSubscriber, Mapping[str, Any]], dict[str, Any]]:
    if method not in _METHODS:
        raise WireFormatError("control method", f"unknown method {method!r}")
    return _METHODS[method]


def parse_connect(payload: Mapping[str, Any]) -> ConnectRequest:
    """A checked connect request.

    Raises:
        WireFormatError: a field is unknown, missing or of the wrong type.
    """
    known = {f.name: f for f in fields(ConnectRequest)}
    unknown = set(payload) - set(known)
    if unknown:
        raise WireFormatError("connect request", f"unknown fields {sorted(unknown)}")
    for name in _TEXTS:
        if name in payload and not isinstance(payload[name], str):
            raise WireFormatError("connect request", f"{name} must be a string")
    for name in ("group", "engine"):
        if not payload.get(name):
            raise WireFormatError("connect request", f"{name} is missing")
    lent = payload.get("lent_version", 0)
    if not isinstance(lent, int) or isinstance(lent, bool) or lent < 0:
        raise WireFormatError("connect request", f"lent_version must be a version, got {lent!r}")
    try:
        share = check_read_share(payload.get("read_share", WITHOUT_REST))
        check_policy(payload.get("fan_out", AUTO))
    except ConfigError as error:
        raise WireFormatError("connect request", str(error)) from None
    return ConnectRequest(**{**payload, "read_share": share, "timeout_s": parse_timeout(payload)})


def parse_version(payload: Mapping[str, Any]) -> int:
    """The version named in a request.

    Raises:
        WireFormatError: missing, or not a positive integer.
    """
    version = payload.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise WireFormatError("request", f"version must be a positive integer, got {version!r}")
    return version


def parse_timeout(payload: Mapping[str, Any]) -> float:
    """The deadline named in a request, in seconds; 60 when there is none.

    Raises:
        WireFormatError: not a number between 0 and a day.
    """
    timeout_s = check_timeout(payload.get("timeout_s", 60.0))
    if not timeout_s:
        raise WireFormatError("request", f"timeout_s must be more than 0, got {payload['timeout_s']!r}")
    return timeout_s


def parse_verify(payload: Mapping[str, Any]) -> str | None:
    """How a request wants the bytes verified; None when it does not.

    Raises:
        WireFormatError: in a way that there is not.
    """
    verify = payload.get("verify")
    if verify not in (None, "digest"):
        raise WireFormatError("request", f"verify must be 'digest' or left out, got {verify!r}")
    return str(verify) if verify else None


def parse_flag(payload: Mapping[str, Any], name: str) -> bool:
    """A flag of a request; false when it is left out.

    Raises:
        WireFormatError: neither true nor false.
    """
    flag = payload.get(name, False)
    if not isinstance(flag, bool):
        raise WireFormatError("request", f"{name} must be true or false, got {flag!r}")
    return flag


def parse_turn(payload: Mapping[str, Any]) -> int:
    """The turn named in a request, see :mod:`rdt_core.relay`; 0 when there is none.

    Raises:
        WireFormatError: no whole number.
    """
    turn = payload.get("turn", 0)
    if not isinstance(turn, int) or isinstance(turn, bool) or not 0 <= turn < 1 << 63:
        raise WireFormatError("request", f"turn must be a whole number, got {turn!r}")
    return turn


def _connect(subscriber: WeightSubscriber, payload: Mapping[str, Any]) -> dict[str, Any]:
    return subscriber.connect(parse_connect(payload))


def _prepare(subscriber: WeightSubscriber, payload: Mapping[str, Any]) -> dict[str, Any]:
    version, timeout_s, verify = parse_version(payload), parse_timeout(payload), parse_verify(payload)
    attempt = payload.get("attempt")
    if attempt is None:
        return subscriber.prepare(version, timeout_s=timeout_s, verify=verify)
    awaits = parse_flag(payload, "awaits_publication")
    subscriber.start_prepare(
        version,
        str(attempt),
        timeout_s=timeout_s,
        verify=verify,
        awaits_publication=awaits,
        circles=payload.get("circles", {}),
        turn=parse_turn(payload),
    )
    return {"version": version, "attempt": str(attempt)}


def _commit(subscriber: WeightSubscriber, payload: Mapping[str, Any]) -> dict[str, Any]:
    return subscriber.commit(
        parse_version(payload), timeout_s=parse_timeout(payload), verify=parse_verify(payload)
    )


def _abort(subscriber: WeightSubscriber, payload: Mapping[str, Any]) -> dict[str, Any]:
    del payload
    subscriber.abort()
    return subscriber.status()


def _lend(subscriber: WeightSubscriber, payload: Mapping[str, Any]) -> dict[str, Any]:
    subscriber.lend(parse_version(payload))
    return subscriber.status()


def _reclaim(subscriber: WeightSubscriber, payload: Mapping[str, Any]) -> dict[str, Any]:
    del payload
    subscriber.reclaim()
    return subscriber.status()


def _disconnect(subscriber: WeightSubscriber, payload: Mapping[str, Any]) -> dict[str, Any]:
    group = payload.get("group")
    if not isinstance(group, (str, type(None))):
        raise WireFormatError("disconnect request", f"group must be a string or left out, got {group!r}")
    subscriber.disconnect(group)
    return subscriber.status()


def _digest(subscriber: WeightSubscriber, payload: Mapping[str, Any]) -> dict[str, Any]:
    del payload
    return {
        "version": subscriber.version,
        "rank": subscriber.status()["rank"],
        "unverified": subscriber.unverified(),
        "digests": [asdict(digest) for digest in subscriber.digests()],
    }


def _status(subscriber: WeightSubscriber, payload: Mapping[str, Any]) -> dict[str, Any]:
    del payload
    return subscriber.status()


_METHODS: dict[str, Callable[[WeightSubscriber, Mapping[str, Any]], dict[str, Any]]] = {
    "abort": _abort,
    "commit": _commit,
    "connect": _connect,
    "digest": _digest,
    "disconnect": _disconnect,
    "lend": _lend,
    "prepare": _prepare,
    "reclaim": _reclaim,
    "status": _status,
}
