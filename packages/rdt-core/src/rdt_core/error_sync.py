"""Errors of a sync under way: versions, bytes and memory."""

from __future__ import annotations

from rdt_core.error_base import RdtError


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


class AbortedError(VersionError):
    """A read that its driver took back, or that a later one replaced."""

    def __init__(self, version: int) -> None:
        self.version = version
        super().__init__(
            f"the read of version {version} was aborted, or replaced by a later one. Nothing was committed; "
            "sync again.",
            (version,),
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


class ReleasedError(VersionError):
    """The trainer has begun to write again, so that a version is no longer there to be read."""

    def __init__(self, version: int, ranks: tuple[int, ...]) -> None:
        self.version, self.ranks = version, tuple(ranks)
        super().__init__(
            f"trainer ranks {list(ranks)} released version {version} (publisher.writing() or release()), so "
            "it cannot be read any more. Sync before the next write, or sync the next version.",
            (version, tuple(ranks)),
        )


class LeaseLostError(VersionError):
    """A read outlived its lease: its deadline passed, or a trainer that had waited for it revoked it."""

    def __init__(self, version: int) -> None:
        self.version = version
        super().__init__(
            f"reading version {version} took longer than its lease, which ran out or was revoked by a "
            "trainer that had to write. What was read is dropped; raise timeout_s of update or of writing().",
            (version,),
        )


class TornReadError(VersionError):
    """The bytes that were read are not the bytes that the trainer holds."""

    def __init__(self, version: int, trainer_rank: int) -> None:
        self.version, self.trainer_rank = version, trainer_rank
        super().__init__(
            f"what was read of version {version} differs from what trainer rank {trainer_rank} holds, by "
            "digest: it was written while it was read. Write within publisher.writing(), and sync again.",
            (version, trainer_rank),
        )


class TopologyChangedError(VersionError):
    """The trainer ranks are not the ones that an engine rank planned its reads for."""

    def __init__(self, group: str, detail: str) -> None:
        self.group, self.detail = group, detail
        super().__init__(
            f"the trainer ranks of sync group {group!r} changed since this engine rank connected: {detail}. "
            "Nothing was committed. Engines plan again by themselves where the tensors are the same; connect "
            "again where they are not.",
            (group, detail),
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


class TransportLiesError(TransportError):
    """A transport reported success and brought other bytes than the trainer's. Found by the probe."""

    def __init__(self, transport: str, trainer_rank: int, fault: str) -> None:
        self.transport, self.trainer_rank, self.fault = transport, trainer_rank, fault
        super().__init__(
            f"transport {transport!r} {fault} when it was tried with trainer rank {trainer_rank}, and "
            "reported success. Nothing was synced; force another transport (RDT_TRANSPORT) and report this "
            "one with its version.",
            (transport, trainer_rank, fault),
        )


class SourceDiedError(TransportError):
    """The process that held the bytes ended before or during a read."""

    def __init__(self, trainer_rank: int, detail: str) -> None:
        self.trainer_rank, self.detail = trainer_rank, detail
        super().__init__(
            f"trainer rank {trainer_rank} died before its bytes were read ({detail}). The engine still "
            "serves the last committed version; restart the trainer, have it publish, and update again.",
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


class UpdateFailedError(RdtError):
    """A sync failed on an engine; ``__cause__`` has the reason by its own type.

    Raised in ``prepare``, nothing was committed anywhere. Raised in ``commit``, the engines that had
    committed serve the new version and the others what they served; the next update brings all to one.
    """

    def __init__(self, version: int, phase: str, engine: str, rank: int, detail: str) -> None:
        self.version, self.phase, self.engine, self.rank, self.detail = version, phase, engine, rank, detail
        where = (
            f"rank {rank} of engine {engine}" if rank >= 0 else f"engine {engine} (rank {rank}: all of it)"
        )
        super().__init__(
            f"version {version} failed in {phase} on {where}: {detail}",
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


class ReplicaMismatchError(RdtError):
    """Two trainer ranks hold one region of a tensor with different bytes."""

    def __init__(self, tensor: str, region: str, rank: int, other_rank: int) -> None:
        self.tensor, self.region, self.rank, self.other_rank = tensor, region, rank, other_rank
        super().__init__(
            f"trainer ranks {rank} and {other_rank} both hold {tensor}{region}, with different bytes. "
            "Engines read either. Look for gradients that are not reduced over all replicas, or for a rank "
            "that was initialised or loaded otherwise.",
            (tensor, region, rank, other_rank),
        )


class ArenaMemoryError(RdtError):
    """A trainer rank has no memory for what an engine asks it to lay out."""

    def __init__(self, nbytes: int, device: str) -> None:
        self.nbytes, self.device = nbytes, device
        super().__init__(
            f"a trainer rank cannot allocate {nbytes} bytes on {device} for an arena of packed and cast "
            'tensors. Free memory there, or connect with arenas="never": engines then read the parameters as '
            "they lie, which takes longer.",
            (nbytes, device),
        )
