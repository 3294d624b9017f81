"""Errors of settings, descriptions, plans and models: what a user has to change before anything can run."""

from __future__ import annotations

from rdt_core.error_base import RdtError


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

    def __init__(
        self, tensor: str, needed: str, engine_rank: int, without: tuple[int, ...] | list[int] = ()
    ) -> None:
        self.tensor, self.needed, self.engine_rank, self.without = tensor, needed, engine_rank, tuple(without)
        holders = f" Trainer ranks without any of it: {_some(self.without)}." if self.without else ""
        super().__init__(
            f"no trainer rank holds {tensor}{needed}, which engine rank {engine_rank} needs.{holders} "
            "Check that every rank attached all of its parameters, frozen ones too, and that the exporter "
            f"has a rule for {tensor!r}.",
            (tensor, needed, engine_rank, self.without),
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


_SHOWN = 3


def _some(names: tuple[object, ...]) -> str:
    shown = ", ".join(map(str, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
