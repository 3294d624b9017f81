"""Errors as HTTP answers: always an error status, always the reason in the body."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse

from rdt_core import errors
from rdt_core.gateway.errors import (
    PairBusyError,
    PairExistsError,
    StoreFullError,
    TrainerWorkerError,
    UnknownPairError,
    UnsupportedRequestError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.errors import RdtError

INTERNAL_ERROR = 500
_STATUS_OF_ERROR: tuple[tuple[type[RdtError], int], ...] = (
    (UnsupportedRequestError, 400),
    (UnknownPairError, 404),
    (PairExistsError, 409),
    (PairBusyError, 409),
    (StoreFullError, 507),
    (TrainerWorkerError, 502),
    (errors.InvalidVersionError, 400),
    (errors.ConfigError, 400),
    (errors.WireFormatError, 400),
    (errors.UnknownGroupError, 404),
    (errors.CoordinatorLostError, 503),
    (errors.NoRayClusterError, 503),
    (errors.RayAuthError, 503),
    (errors.SessionError, 409),
    (errors.VersionError, 409),
    (errors.PlanError, 422),
    (errors.ModelMismatchError, 422),
    (errors.ManifestError, 422),
    (errors.PullTimeoutError, 504),
    (errors.DeadlineError, 504),
    (errors.TransportError, 502),
    (errors.EngineError, 502),
)


def status_of(error: BaseException) -> int:
    """The HTTP status that tells a client what kind of error it is."""
    if isinstance(error, errors.UpdateFailedError) and isinstance(error.__cause__, errors.RdtError):
        return status_of(error.__cause__)
    return next((status for kind, status in _STATUS_OF_ERROR if isinstance(error, kind)), INTERNAL_ERROR)


def describe(error: BaseException) -> str:
    """The text for the client. Of an error that is not ours only its kind is told; the log has the rest."""
    if isinstance(error, errors.RdtError):
        return error.message
    return f"{type(error).__name__} in the gateway. Look into its log."


def error_answer(
    error: BaseException, *, status: int | None = None, more: Mapping[str, object] | None = None
) -> JSONResponse:
    """The answer for an error, ``{"error", "error_type"}`` and what the route adds."""
    body = {"error": describe(error), "error_type": type(error).__name__, **(more or {})}
    return JSONResponse(body, status_code=status or status_of(error))


def update_error_fields(version: int, duration_ms: float, *, may_be_mutated: bool) -> dict[str, object]:
    """What a failed update adds to ``error`` and ``error_type``: the fields AReaL's clients read."""
    return {
        "status": "error",
        "version": version,
        "duration_ms": duration_ms,
        "phases": {},
        "inference_weights_may_be_mutated": may_be_mutated,
    }
