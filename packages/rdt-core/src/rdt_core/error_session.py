"""Errors of parties that did not come together, do not answer or refuse."""

from __future__ import annotations

from rdt_core.error_base import RdtError

_REMEDY_OF_STATUS = {401: "Pass its key: connect(..., api_key=...).", 404: "Start it with --weight-sync rdt."}


class SessionError(RdtError):
    """The parties of a group did not come together."""


class NoRayClusterError(SessionError):
    """No Ray cluster to join."""

    def __init__(self, address: str, reason: str) -> None:
        self.address, self.reason = address, reason
        super().__init__(
            f"cannot join a Ray cluster at {address!r}: {reason}. Start one with `ray start --head`, or call "
            "ray.init(address=...) or set RAY_ADDRESS before this.",
            (address, reason),
        )


class RayAuthError(SessionError):
    """The Ray cluster refused our token, or wants one."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__(
            f"the Ray cluster at {address!r} refused this process's token. Set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the same token in the trainers, the driver and every "
            "engine, or RAY_AUTH_MODE=disabled in all of them.",
            (address,),
        )


class UnknownGroupError(SessionError):
    """No trainer has attached under this group name."""

    def __init__(self, group: str, namespace: str) -> None:
        self.group, self.namespace = group, namespace
        super().__init__(
            f"there is no sync group {group!r} in Ray namespace {namespace!r}. Call "
            "WeightPublisher.attach with this name in every trainer rank first.",
            (group, namespace),
        )


class GroupInUseError(SessionError):
    """A second, live publisher under one group name and rank."""

    def __init__(self, group: str, rank: int) -> None:
        self.group, self.rank = group, rank
        super().__init__(
            f"trainer rank {rank} of sync group {group!r} is already attached by another live process. "
            "Close that publisher, or attach under another group name.",
            (group, rank),
        )


class MissingTrainerRankError(SessionError):
    """Some trainer ranks have not attached, have fallen silent, or do not answer."""

    def __init__(self, group: str, missing: tuple[int, ...], world_size: int, waited_s: float) -> None:
        self.group, self.missing, self.world_size, self.waited_s = group, tuple(missing), world_size, waited_s
        super().__init__(
            f"sync group {group!r} lacks trainer ranks {list(missing)} of {world_size} after "
            f"{waited_s:.1f} s: they have not attached, gave no sign of life for a while, or did not answer. "
            "Call WeightPublisher.attach in every rank; if they did, look for a dead, stopped or starved "
            "trainer process.",
            (group, tuple(missing), world_size, waited_s),
        )


class NotConnectedError(SessionError):
    """A sync was asked of an engine that has not connected to a group."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        super().__init__(
            f"cannot {operation}: this engine is in no sync group. Call WeightSync.connect first.",
            (operation,),
        )


class CoordinatorLostError(SessionError):
    """The group's coordinator actor ended."""

    def __init__(self, group: str, detail: str) -> None:
        self.group, self.detail = group, detail
        super().__init__(
            f"the coordinator of sync group {group!r} is gone ({detail}). Ray restarts one that died: update "
            "again. Once the trainers have left there is none: attach and connect again.",
            (group, detail),
        )


class CannotLendError(SessionError):
    """An engine rank cannot let another engine read its parameters."""

    def __init__(self, rank: int, reason: str) -> None:
        self.rank, self.reason = rank, reason
        super().__init__(
            f"engine rank {rank} cannot lend its weights: {reason}. Another engine can read them from the "
            "trainers; it gets their next version with the next update.",
            (rank, reason),
        )


class ForgottenError(SessionError):
    """The coordinator does not know a member: it was restarted, or the member left."""

    def __init__(self, group: str, member: str) -> None:
        self.group, self.member = group, member
        super().__init__(
            f"the coordinator of sync group {group!r} does not know {member}; it was restarted, or {member} "
            "has left. Members introduce themselves again by themselves; if this reaches you, connect again.",
            (group, member),
        )


class VersionSkewError(SessionError):
    """The group's coordinator was started by another version of rdt-core."""

    def __init__(self, group: str, method: str, here: str) -> None:
        self.group, self.method, self.here = group, method, here
        super().__init__(
            f"the coordinator of sync group {group!r} does not take {method!r} as rdt-core {here} of this "
            "process calls it: the trainers run another version. Install one version of rdt-core in "
            "trainers, driver and engines.",
            (group, method, here),
        )


class ClosedError(SessionError):
    """Use of a publisher, subscriber or sync after ``close``."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"this {what} has been closed. Make a new one.", (what,))


class EngineError(RdtError):
    """An engine refused or failed."""


class EngineUnreachableError(EngineError):
    """An engine's HTTP address does not answer."""

    def __init__(self, engine: str, reason: str) -> None:
        self.engine, self.reason = engine, reason
        super().__init__(
            f"engine {engine} does not answer: {reason}. Check its address and that it runs.",
            (engine, reason),
        )


class EngineTornError(EngineError):
    """An engine whose parameters hold parts of two versions, and which therefore generates nothing."""

    def __init__(self, engine: str, version: int) -> None:
        self.engine, self.version = engine, version
        super().__init__(
            f"engine {engine} holds parts of two versions, because taking a version after {version} failed "
            "half-way. It generates nothing until a sync of any later version succeeds; sync one, or "
            "restart the engine.",
            (engine, version),
        )


class EngineAsleepError(EngineError):
    """The memory of an engine's weights is away, as its user wished: it can neither be read nor written."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        super().__init__(
            f"cannot {operation}: this engine sleeps, and the memory of its weights is given away. Wake its "
            "weights first (vLLM: POST /wake_up?tags=weights; SGLang: POST /resume_memory_occupation with "
            '{"tags": ["weights"]}), then try again.',
            (operation,),
        )


class EngineRefusedError(EngineError):
    """An engine answered a control request with an error that is not one of ours."""

    def __init__(self, engine: str, status: int, detail: str) -> None:
        self.engine, self.status, self.detail = engine, status, detail
        remedy = _REMEDY_OF_STATUS.get(status, "Look into the engine's log.")
        super().__init__(f"engine {engine} answered {status}: {detail}. {remedy}", (engine, status, detail))


class BusyError(SessionError):
    """A driver was asked for something while it does something else."""

    def __init__(self, asked: str, state: str) -> None:
        self.asked, self.state = asked, state
        super().__init__(
            f"cannot {asked} now: this WeightSync is {state}. Call it from one thread, call after call.",
            (asked, state),
        )


class DeadlineError(RdtError):
    """A wait ran out."""

    def __init__(self, what: str, waited_s: float, remedy: str) -> None:
        self.what, self.waited_s, self.remedy = what, waited_s, remedy
        super().__init__(
            f"gave up waiting for {what} after {waited_s:.1f} s. {remedy}", (what, waited_s, remedy)
        )
