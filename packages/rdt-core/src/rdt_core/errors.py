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
    |   |-- VersionSkewError
    |   |-- GroupInUseError
    |   |-- MissingTrainerRankError
    |   |-- NotConnectedError
    |   |-- CoordinatorLostError
    |   |-- BusyError
    |   |-- ForgottenError
    |   |-- CannotLendError
    |   `-- ClosedError
    |-- VersionError                versions only grow, and only a published one can be read
    |   |-- StaleVersionError
    |   |-- NotPublishedError
    |   |-- NotPreparedError
    |   |-- AbortedError
    |   |-- ReleasedError
    |   |-- LeaseLostError
    |   |-- TornReadError
    |   |-- TopologyChangedError
    |   `-- SupersededError
    |-- TransportError              bytes did not arrive
    |   |-- TransportUnavailableError
    |   |-- TransportLiesError
    |   |-- SourceDiedError
    |   `-- PullTimeoutError
    |-- EngineError                 an engine refused or failed
    |   |-- EngineUnreachableError
    |   |-- EngineTornError
    |   |-- EngineAsleepError
    |   `-- EngineRefusedError
    |-- UpdateFailedError           a sync ended without a commit; the old version serves
    |-- WindowMovedError            a parameter's memory is no longer where it was attached
    |-- ReplicaMismatchError        two trainer ranks hold one region with different bytes
    |-- ArenaMemoryError            a trainer rank has no memory for what an engine asks of it
    `-- DeadlineError               a wait ran out

The classes are defined by family in ``rdt_core.error_*`` and imported from here. Errors cross processes by
Ray's pickle and, over HTTP, in the form of ``rdt_core.error_wire``.
"""

from __future__ import annotations

from rdt_core.error_base import RdtError
from rdt_core.error_description import (
    ConfigError,
    CoverageError,
    DtypeError,
    InvalidVersionError,
    ManifestError,
    ModelMismatchError,
    OverlapError,
    PlanError,
    ShapeError,
    UncoveredParameterError,
    UnknownDtypeError,
    UnknownTensorError,
    UnsupportedEngineError,
    UnsupportedLayoutError,
    UnsupportedLoaderError,
    UnusedTensorError,
    WireFormatError,
)
from rdt_core.error_session import (
    BusyError,
    CannotLendError,
    ClosedError,
    CoordinatorLostError,
    DeadlineError,
    EngineAsleepError,
    EngineError,
    EngineRefusedError,
    EngineTornError,
    EngineUnreachableError,
    ForgottenError,
    GroupInUseError,
    MissingTrainerRankError,
    NoRayClusterError,
    NotConnectedError,
    RayAuthError,
    SessionError,
    UnknownGroupError,
    VersionSkewError,
)
from rdt_core.error_sync import (
    AbortedError,
    ArenaMemoryError,
    LeaseLostError,
    NotPreparedError,
    NotPublishedError,
    PullTimeoutError,
    ReleasedError,
    ReplicaMismatchError,
    SourceDiedError,
    StaleVersionError,
    SupersededError,
    TopologyChangedError,
    TornReadError,
    TransportError,
    TransportLiesError,
    TransportUnavailableError,
    UpdateFailedError,
    VersionError,
    WindowMovedError,
)

__all__ = [
    "AbortedError",
    "ArenaMemoryError",
    "BusyError",
    "CannotLendError",
    "ClosedError",
    "ConfigError",
    "CoordinatorLostError",
    "CoverageError",
    "DeadlineError",
    "DtypeError",
    "EngineAsleepError",
    "EngineError",
    "EngineRefusedError",
    "EngineTornError",
    "EngineUnreachableError",
    "ForgottenError",
    "GroupInUseError",
    "InvalidVersionError",
    "LeaseLostError",
    "ManifestError",
    "MissingTrainerRankError",
    "ModelMismatchError",
    "NoRayClusterError",
    "NotConnectedError",
    "NotPreparedError",
    "NotPublishedError",
    "OverlapError",
    "PlanError",
    "PullTimeoutError",
    "RayAuthError",
    "RdtError",
    "ReleasedError",
    "ReplicaMismatchError",
    "SessionError",
    "ShapeError",
    "SourceDiedError",
    "StaleVersionError",
    "SupersededError",
    "TopologyChangedError",
    "TornReadError",
    "TransportError",
    "TransportLiesError",
    "TransportUnavailableError",
    "UncoveredParameterError",
    "UnknownDtypeError",
    "UnknownGroupError",
    "UnknownTensorError",
    "UnsupportedEngineError",
    "UnsupportedLayoutError",
    "UnsupportedLoaderError",
    "UnusedTensorError",
    "UpdateFailedError",
    "VersionError",
    "VersionSkewError",
    "WindowMovedError",
    "WireFormatError",
]
