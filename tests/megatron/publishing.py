"""What Megatron ranks do beside an engine: train, publish, and say which token they would generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tests.megatron import cpu_shim

cpu_shim.install()

from transformers import AutoConfig  # noqa: E402  # Megatron is imported after the shim

from rdt_core.publisher import WeightPublisher  # noqa: E402
from rdt_megatron import megatron_shards  # noqa: E402
from tests.megatron.configurations import Configuration  # noqa: E402
from tests.megatron.megatron_models import start_trainer, tokens  # noqa: E402

if TYPE_CHECKING:
    from tests.megatron.megatron_models import Trainer

_state: dict[str, Any] = {}


def attach(group: str, model_folder: str, sizes: dict[str, Any]) -> int:
    """Build the model of a checkpoint's configuration and offer it; bytes that this rank holds."""
    hf = AutoConfig.from_pretrained(model_folder)
    c = Configuration(
        family=hf.model_type,
        num_ranks=dist.get_world_size(),
        is_tied=hf.tie_word_embeddings,
        vocab=hf.vocab_size,
        **sizes,
    )
    trainer = start_trainer(c, hf)
    _state["trainer"] = trainer
    _state["publisher"] = WeightPublisher.attach(group, megatron_shards(trainer.chunks, hf))
    return int(_state["publisher"].nbytes)


def train_and_publish(version: int) -> bool:
    """One step, then publish; whether the step changed all that this rank holds."""
    trainer: Trainer = _state["trainer"]
    before = [parameter.detach().clone() for chunk in trainer.bare for parameter in chunk.parameters()]
    trainer.train(1)
    _state["publisher"].publish(version)
    after = [parameter for chunk in trainer.bare for parameter in chunk.parameters()]
    return not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def next_tokens() -> list[int]:
    """The greedy next token after each of the prompts; nothing where the last stage is elsewhere."""
    logits = _state["trainer"].logits()
    return [] if logits is None else list(map(int, logits[:, -1].argmax(-1)))


def prompts() -> list[list[int]]:
    """What ``next_tokens`` goes on from."""
    ids: torch.Tensor = tokens(_state["trainer"].configuration.vocab, 0)
    return [list(map(int, row)) for row in ids]


def close() -> None:
    """Leave the group."""
    _state["publisher"].close()
