"""Every error this project raises on purpose.

    RdtError
    |-- ConfigError                 a setting cannot be used
    |   |-- UnknownDtypeError
    |   |-- InvalidVersionError
    |   `-- UnsupportedEngineError
    |-- ManifestError               a description is malformed, or of another format version
    |   |-- WireFormatError
    |   `-- UnsupportedLayoutError
    |-- PlanError                   two descriptions do not fit together
    |   |-- CoverageError
    |   |-- OverlapError
    |   |-- DtypeError
    |   |-- UnknownTensorError
    |   `-- ShapeError
    |-- ModelMismatchError          the engine's model cannot take the trainer's tensors
    |   |-- UnusedTensorError
    |   |-- UncoveredParameterError
    |   `-- UnsupportedLoaderError
    |-- SessionError                the parties of a group did not come together
    |   |-- NoRayClusterError
    |   |-- RayAuthError
    |   |-- UnknownGroupError
    |   |-- GroupInUseError
    |   |-- MissingTrainerRankError
    |   |-- NotConnectedError
    |   |-- CoordinatorLostError
    |   `-- ClosedError
    |-- VersionError                versions only grow, and only a published one can be read
    |   |-- StaleVersionError
    |   |-- NotPublishedError
    |   |-- NotPreparedError
    |   `-- SupersededError
    |-- TransportError              bytes did not arrive
    |   |-- TransportUnavailableError
    |   |-- SourceDiedError
    |   `-- PullTimeoutError
    |-- EngineError                 an engine refused or failed
    |   |-- EngineUnreachableError
    |   `-- EngineRefusedError
    |-- UpdateFailedError           a sync ended without a commit; the old version serves
    |-- WindowMovedError            a parameter's memory is no longer where it was attached
    `-- DeadlineError               a wait ran out

Errors cross processes by Ray's pickle and, over HTTP, in the form of ``rdt_core.error_wire``.
"""

from __future__ import annotations


class RdtError(Exception):
    """Base of every error raised on purpose by this project.

    Args:
        message: what happened, what was expected, what to do next.
        fields: the subclass's arguments, to rebuild it in another process: plain values and sequences only.
    """

    def __init__(self, message: str, fields: tuple[object, ...] = ()) -> None:
        self.message = message
        self.fields: tuple[object, ...] = fields or (message,)
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RdtError], tuple[object, ...]]:
        return (type(self), self.fields)


class ConfigError(RdtError):
    """A setting cannot be used."""


class UnknownDtypeError(ConfigError):
    """An element type that this project does not move."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        super().__init__(
            f"element type {dtype!r} is not supported. Supported are the names in "
            "rdt_core.dtypes.ITEMSIZE_BYTES; quantized types are not exported.",
            (dtype,),
        )


class InvalidVersionError(ConfigError):
    """A version that is not a positive integer."""

    def __init__(self, version: object) -> None:
        self.version = version if version is None or isinstance(version, int | float | str) else repr(version)
        super().__init__(
            f"version {self.version!r} cannot be used. Expected an integer of 1 or more, a step count say.",
            (self.version,),
        )


class UnsupportedEngineError(ConfigError):
    """An engine version whose internals differ from the ones this adapter was written for."""

    def __init__(self, engine: str, version: str, missing: str) -> None:
        self.engine, self.version, self.missing = engine, version, missing
        super().__init__(
            f"{engine} {version} has no {missing}, which weight sync hooks into. Install a version "
            "listed as supported in the adapter's documentation, or start without --weight-sync.",
            (engine, version, missing),
        )


class ManifestError(RdtError):
    """A description is malformed, or of another format version."""


class WireFormatError(ManifestError):
    """Bytes that are not one of our messages."""

    def __init__(self, what: str, reason: str) -> None:
        self.what, self.reason = what, reason
        super().__init__(
            f"cannot read {what}: {reason}. Check that both sides run the same rdt-core version.",
            (what, reason),
        )


class UnsupportedLayoutError(ManifestError):
    """A trainer parameter whose memory cannot be described as regions of a checkpoint tensor."""

    def __init__(self, tensor: str, rank: int, reason: str, remedy: str) -> None:
        self.tensor, self.rank, self.reason, self.remedy = tensor, rank, reason, remedy
        super().__init__(
            f"cannot export {tensor} of trainer rank {rank}: {reason}. {remedy}",
            (tensor, rank, reason, remedy),
        )


class PlanError(RdtError):
    """Two descriptions do not fit together."""


class CoverageError(PlanError):
    """Part of what an engine rank needs is held by no trainer rank."""

    def __init__(self, tensor: str, needed: str, engine_rank: int) -> None:
        self.tensor, self.needed, self.engine_rank = tensor, needed, engine_rank
        super().__init__(
            f"no trainer rank holds {tensor}{needed}, which engine rank {engine_rank} needs. Check that "
            f"every rank attached its shards, and that the exporter has a rule for {tensor!r}.",
            (tensor, needed, engine_rank),
        )


class OverlapError(PlanError):
    """Two different regions of one tensor share elements, so that it is unclear which bytes hold."""

    def __init__(self, tensor: str, first: str, first_rank: int, second: str, second_rank: int) -> None:
        self.tensor, self.first, self.second = tensor, first, second
        self.first_rank, self.second_rank = first_rank, second_rank
        super().__init__(
            f"{tensor}{first} of trainer rank {first_rank} overlaps {tensor}{second} of trainer rank "
            f"{second_rank}. Regions must be equal (replicas) or disjoint; check the exporter.",
            (tensor, first, first_rank, second, second_rank),
        )


class DtypeError(PlanError):
    """Bytes of one element type cannot land in a parameter of another."""

    def __init__(self, tensor: str, region: str, source: str, target: str, trainer_rank: int) -> None:
        self.tensor, self.region, self.source, self.target = tensor, region, source, target
        self.trainer_rank = trainer_rank
        super().__init__(
            f"{tensor}{region} is {source} on trainer rank {trainer_rank} and {target} in the engine, and "
            f"there is no conversion between them. Start the engine with a dtype that {source} converts to.",
            (tensor, region, source, target, trainer_rank),
        )


class UnknownTensorError(PlanError):
    """The engine asks for a tensor that no trainer rank knows."""

    def __init__(self, tensor: str, engine_rank: int) -> None:
        self.tensor, self.engine_rank = tensor, engine_rank
        super().__init__(
            f"engine rank {engine_rank} needs {tensor!r}, which no trainer rank exports. Check that both "
            "sides run the same model, and the exporter's name rules.",
            (tensor, engine_rank),
        )


class ShapeError(PlanError):
    """Two descriptions give one tensor different global shapes, or a region outside of its shape."""

    def __init__(self, tensor: str, rank: int, got: str, expected: str) -> None:
        self.tensor, self.rank, self.got, self.expected = tensor, rank, got, expected
        super().__init__(
            f"{tensor} is {got} on rank {rank}, expected {expected}. Check that every rank and the engine "
            "run the same model configuration.",
            (tensor, rank, got, expected),
        )


class ModelMismatchError(RdtError):
    """The engine's model cannot take the trainer's tensors."""

    def __init__(self, tensor: str, reason: str) -> None:
        self.tensor, self.reason = tensor, reason
        super().__init__(
            f"the engine's loader refused {tensor!r}: {reason}. Trainer and engine must run the same model "
            "configuration; compare both config.json files (vocab_size, hidden sizes, layers).",
            (tensor, reason),
        )


class UnusedTensorError(ModelMismatchError):
    """The trainer exports tensors that the engine's loader does not use."""

    def __init__(self, tensors: tuple[str, ...]) -> None:
        RdtError.__init__(
            self,
            f"the engine's model does not use {_some(tensors)} of the trainer. Trainer and engine must run "
            "the same model; export only what the engine loads.",
            (tuple(tensors),),
        )
        self.tensors = tuple(tensors)


class UncoveredParameterError(ModelMismatchError):
    """Parameters of the engine that no tensor of the trainer fills."""

    def __init__(self, parameters: tuple[str, ...]) -> None:
        RdtError.__init__(
            self,
            f"nothing that the trainer exports fills {_some(parameters)} of the engine's model. Trainer and "
            "engine must run the same model; check that every trainer rank exports all of its parameters.",
            (tuple(parameters),),
        )
        self.parameters = tuple(parameters)


class UnsupportedLoaderError(ModelMismatchError):
    """The engine's loader does something to a tensor that cannot be replayed by reads."""

    def __init__(self, tensor: str, operation: str) -> None:
        RdtError.__init__(
            self,
            f"the engine's loader applies {operation} to {tensor!r}, which cannot be replayed by reads, and "
            "the adapter has no reload path for it. Report the model's name with this message.",
            (tensor, operation),
        )
        self.tensor, self.operation = tensor, operation


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
    """Some trainer ranks have not attached, or have fallen silent."""

    def __init__(self, group: str, missing: tuple[int, ...], world_size: int, waited_s: float) -> None:
        self.group, self.missing, self.world_size, self.waited_s = group, tuple(missing), world_size, waited_s
        super().__init__(
            f"sync group {group!r} lacks trainer ranks {list(missing)} of {world_size} after "
            f"{waited_s:.1f} s. Call WeightPublisher.attach in every rank; if they did, look for a "
            "dead trainer process.",
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
            f"the coordinator of sync group {group!r} is gone ({detail}). Attach and connect again.",
            (group, detail),
        )


class ClosedError(SessionError):
    """Use of a publisher, subscriber or sync after ``close``."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"this {what} has been closed. Make a new one.", (what,))


class VersionError(RdtError):
    """Versions only grow, and only a published one can be read."""


class StaleVersionError(VersionError):
    """A version that is not greater than the last one."""

    def __init__(self, version: int, last: int, where: str) -> None:
        self.version, self.last, self.where = version, last, where
        super().__init__(
            f"version {version} is not greater than {last}, the last one {where}. Versions only grow; "
            f"use {last + 1} or more.",
            (version, last, where),
        )


class NotPublishedError(VersionError):
    """A version that some trainer rank has not published yet."""

    def __init__(self, version: int, missing: tuple[int, ...], waited_s: float) -> None:
        self.version, self.missing, self.waited_s = version, tuple(missing), waited_s
        super().__init__(
            f"trainer ranks {list(missing)} have not published version {version} after {waited_s:.1f} s. "
            "Call publisher.publish(version=...) in every rank after optimizer.step().",
            (version, tuple(missing), waited_s),
        )


class NotPreparedError(VersionError):
    """A commit of a version that this engine rank has not read."""

    def __init__(self, version: int, prepared: int | None) -> None:
        self.version, self.prepared = version, prepared
        super().__init__(
            f"cannot commit version {version}: this engine rank has {prepared or 'nothing'} prepared. Call "
            "prepare with this version first, and wait for it.",
            (version, prepared),
        )


class SupersededError(VersionError):
    """The trainer published another version while this one was being read: the bytes may be mixed."""

    def __init__(self, version: int, current: int) -> None:
        self.version, self.current = version, current
        super().__init__(
            f"version {version} was replaced by {current} while it was being read, so the bytes read may mix "
            f"both. Nothing was committed; finish a sync before the next publish, or sync version {current}.",
            (version, current),
        )


class TransportError(RdtError):
    """Bytes did not arrive."""


class TransportUnavailableError(TransportError):
    """A transport cannot run in this process."""

    def __init__(self, transport: str, reason: str, remedy: str) -> None:
        self.transport, self.reason, self.remedy = transport, reason, remedy
        super().__init__(
            f"transport {transport!r} cannot run here: {reason}. {remedy}", (transport, reason, remedy)
        )


class SourceDiedError(TransportError):
    """The process that held the bytes ended before or during a read."""

    def __init__(self, trainer_rank: int, detail: str) -> None:
        self.trainer_rank, self.detail = trainer_rank, detail
        super().__init__(
            f"trainer rank {trainer_rank} died before its bytes were read ({detail}). The engine still "
            "serves the last committed version; restart the trainer and connect again.",
            (trainer_rank, detail),
        )


class PullTimeoutError(TransportError):
    """A read did not end within its deadline."""

    def __init__(self, trainer_rank: int, timeout_s: float) -> None:
        self.trainer_rank, self.timeout_s = trainer_rank, timeout_s
        super().__init__(
            f"reading from trainer rank {trainer_rank} did not end within {timeout_s:.1f} s. The engine "
            "still serves the last committed version; look for a stopped trainer process, or "
            "raise timeout_s.",
            (trainer_rank, timeout_s),
        )


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


class EngineRefusedError(EngineError):
    """An engine answered a control request with an error that is not one of ours."""

    def __init__(self, engine: str, status: int, detail: str) -> None:
        self.engine, self.status, self.detail = engine, status, detail
        remedy = _REMEDY_OF_STATUS.get(status, "Look into the engine's log.")
        super().__init__(f"engine {engine} answered {status}: {detail}. {remedy}", (engine, status, detail))


class UpdateFailedError(RdtError):
    """A sync ended without a commit on some engine rank. Every engine serves what it served before."""

    def __init__(self, version: int, phase: str, engine: str, rank: int, detail: str) -> None:
        self.version, self.phase, self.engine, self.rank, self.detail = version, phase, engine, rank, detail
        super().__init__(
            f"version {version} failed in {phase} on rank {rank} of engine {engine}: {detail}",
            (version, phase, engine, rank, detail),
        )


class WindowMovedError(RdtError):
    """A parameter's memory is no longer where it was when the publisher attached."""

    def __init__(self, tensor: str, rank: int) -> None:
        self.tensor, self.rank = tensor, rank
        super().__init__(
            f"the memory of {tensor} on trainer rank {rank} moved since attach "
            "(load_state_dict(assign=True), .to() or an offload does this), so engines would read "
            "freed memory. Close the publisher and attach again.",
            (tensor, rank),
        )


class DeadlineError(RdtError):
    """A wait ran out."""

    def __init__(self, what: str, waited_s: float, remedy: str) -> None:
        self.what, self.waited_s, self.remedy = what, waited_s, remedy
        super().__init__(
            f"gave up waiting for {what} after {waited_s:.1f} s. {remedy}", (what, waited_s, remedy)
        )


_SHOWN = 3
_REMEDY_OF_STATUS = {401: "Pass its key: connect(..., api_key=...).", 404: "Start it with --weight-sync rdt."}


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
