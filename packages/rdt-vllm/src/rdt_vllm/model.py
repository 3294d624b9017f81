"""vLLM's model on one worker, as the subscriber sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config

from rdt_core.derived import Hook, refresh
from rdt_core.recorder import is_rotary_table, record_loader
from rdt_vllm import finalize

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.config import VllmConfig

    from rdt_core.manifest import TensorSpec
    from rdt_core.recording import Recording


class VllmModel:
    """One worker's model. Implements :class:`rdt_core.engine_model.EngineModel`.

    Args:
        vllm_config: the worker's own; its ``parallel_config.rank`` is set.
        model: loaded and processed.
        device: of its parameters.

    Attributes:
        is_asleep: set by the worker's sleep and wake-up, see :func:`rdt_vllm.compat.worker.watch_sleep`.
    """

    def __init__(self, vllm_config: VllmConfig, model: Any, device: torch.device) -> None:
        parallel = vllm_config.parallel_config
        self._vllm_config, self._model = vllm_config, model
        self._hooks: tuple[Hook, ...] | None = None
        self.rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.world_size = parallel.world_size_across_dp
        self.device = torch.device(device)
        self.is_asleep = False

    def record(self, specs: Sequence[TensorSpec]) -> Recording:
        """Where the model's own loader puts every region. See :class:`EngineModel`.

        Raises:
            UnsupportedLoaderError: a layer keeps its weights in a layout of its own, or has a post-load hook
                that this adapter does not know.
            ModelMismatchError: the loader refuses a tensor.
        """
        self._hooks = finalize.find_hooks(self._model, self._vllm_config.model_config.dtype)
        with set_current_vllm_config(self._vllm_config), finalize.derived_hidden(self._hooks):
            return record_loader(self._model, specs, skippable=self._may_drop)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load whole checkpoint tensors by the model's own loader. Called at commit."""
        with set_current_vllm_config(self._vllm_config), torch.no_grad():
            self._model.load_weights(tensors)

    def finalize(self) -> None:
        """Recompute what vLLM derives from weights after a load. Called at commit, after the copies."""
        dtype = self._vllm_config.model_config.dtype
        hooks = self._hooks if self._hooks is not None else finalize.find_hooks(self._model, dtype)
        with set_current_vllm_config(self._vllm_config), torch.no_grad():
            for hook in hooks:
                refresh(hook)

    def _may_drop(self, tensor: str) -> bool:
        """Whether vLLM's loaders take and drop a tensor: a tied head, a rotary table of an old checkpoint."""
        is_tied = getattr(self._vllm_config.model_config.hf_text_config, "tie_word_embeddings", False)
        return is_rotary_table(tensor) or (is_tied and tensor.endswith("lm_head.weight"))
