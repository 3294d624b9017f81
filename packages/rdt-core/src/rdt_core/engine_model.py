"""What an engine adapter implements so that the subscriber can fill its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from rdt_core.manifest import TensorSpec
    from rdt_core.recording import Recording


class EngineModel(Protocol):
    """One engine rank's model, as the subscriber sees it. All calls come from the thread that runs the model.

    Attributes:
        rank: this worker's rank among all ranks of one engine (tensor x pipeline x data parallel).
        world_size: number of those ranks.
        device: where its parameters live.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_asleep(self) -> bool:
        """Whether the memory of its parameters is away: nobody may touch them. Asked by any thread."""

    def record(self, specs: Sequence[TensorSpec]) -> Recording:
        """Find, for every region of the given checkpoint tensors, the parameter region it fills.

        Called once at connect. Must leave every parameter and buffer as it was.

        Raises:
            ModelMismatchError: the model cannot take these tensors.
        """

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load whole checkpoint tensors through the engine's own loader.

        Called at commit, before the copies, with exactly the tensors that ``Recording.reload`` names.
        """

    def finalize(self) -> None:
        """Recompute everything the engine derives from its weights. Called at commit, after the copies."""
