"""SGLang's model on one scheduler rank, as the subscriber sees it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from rdt_core.derived import Hook, refresh
from rdt_core.recorder import is_rotary_table, record_loader
from rdt_sglang import compat, finalize

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from rdt_core.manifest import TensorSpec
    from rdt_core.model_thread import ModelThread
    from rdt_core.recording import Recording

# Where a parameter or buffer lies and how it is laid out there.
Place = tuple[str, int, torch.dtype, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Known:
    """A recording, and what it holds for."""

    specs: tuple[TensorSpec, ...]
    places: tuple[Place, ...]
    recording: Recording


class SglangModel:
    """One rank's model. Implements :class:`rdt_core.engine_model.EngineModel`.

    Args:
        scheduler: whose model is loaded and processed.
        model_thread: the scheduler's own; :meth:`record` is called from another one.

    Attributes:
        is_packed: whether weights lie where the loader writes them only within :meth:`unpacked`.
    """

    def __init__(self, scheduler: Any, model_thread: ModelThread) -> None:
        self._scheduler, self._model = scheduler, compat.model_of(scheduler)
        self._model_thread = model_thread
        self._hooks: tuple[Hook, ...] | None = None
        self._known: _Known | None = None
        place = compat.find_place(scheduler)
        self.is_packed = finalize.is_packed(self._model)
        self.rank, self.world_size, self.device = place.rank, place.world_size, place.device

    def record(self, specs: Sequence[TensorSpec]) -> Recording:
        """Where the model's own loader puts every region. See :class:`EngineModel`.

        The loader runs in the scheduler's thread, between two batches, unless it has run for the same tensors
        before and no parameter has moved since.

        Raises:
            UnsupportedLoaderError: a layer keeps its weights in a layout of its own, or has a post-load hook
                that this adapter does not know.
            ModelMismatchError: the loader refuses a tensor.
        """
        known = self._known
        if known is not None and known.specs == tuple(specs) and known.places == _places_of(self._model):
            return known.recording
        return self._model_thread.run(lambda: self._record(tuple(specs)))

    @property
    def is_asleep(self) -> bool:
        """Whether the memory of the weights is released."""
        return compat.are_weights_released(self._scheduler)

    @property
    def num_recorded(self) -> int:
        """Number of tensors whose places are known; a connect for the same ones does not run the loader."""
        return len(self._known.specs) if self._known is not None else 0

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load whole checkpoint tensors by the model's own loader. Called at commit."""
        with compat.loading(self._scheduler), torch.no_grad():
            self._model.load_weights(tensors)

    def unpacked(self) -> AbstractContextManager[None]:
        """Around what reads or writes parameters; packs again what was packed. In the scheduler's thread."""
        return compat.unpacked_weights(self._scheduler) if self.is_packed else nullcontext()

    def finalize(self) -> None:
        """Recompute what SGLang derives from weights after a load. Called at commit, after the copies."""
        hooks = self._hooks if self._hooks is not None else finalize.find_hooks(self._model)
        with torch.no_grad():
            for hook in hooks:
                refresh(hook)

    def _record(self, specs: tuple[TensorSpec, ...]) -> Recording:
        self._hooks = finalize.find_hooks(self._model)
        with compat.loading(self._scheduler), self.unpacked():
            recording = record_loader(self._model, specs, skippable=self._may_drop)
        self._known = _Known(specs, _places_of(self._model), recording)
        return recording

    def _may_drop(self, tensor: str) -> bool:
        """Whether SGLang's loaders drop a tensor: a tied head, a rotary table, one of another stage."""
        is_tied = getattr(getattr(self._model, "config", None), "tie_word_embeddings", False)
        is_tied_head = is_tied and tensor.endswith("lm_head.weight")
        return is_rotary_table(tensor) or is_tied_head or compat.is_of_another_stage(self._model, tensor)


def _places_of(model: torch.nn.Module) -> tuple[Place, ...]:
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return tuple(
        (name, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        for name, tensor in named
    )
