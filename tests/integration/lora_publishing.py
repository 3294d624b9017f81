"""FSDP2 ranks beside an engine: they train a LoRA adapter, publish the sum and say what they would answer."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from rdt_core.publisher import WeightPublisher
from rdt_megatron import merged_shards

PROMPTS = [[3, 41, 7, 120, 9], [77, 5, 18, 18, 60], [1, 2, 3, 4, 5], [200, 90, 31, 8, 13]]

_state: dict[str, Any] = {}


def attach(group: str, model_folder: str, adapter: dict[str, Any]) -> int:
    """Load a checkpoint, add an adapter that is not zero, shard and offer it; bytes that this rank holds."""
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(**adapter))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # Those that the optimizer knows: after an evaluation the model shows gathered ones in their place.
    _state["parameters"] = list(model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _state["model"], _state["optimizer"] = model, torch.optim.AdamW(trained, lr=0.02)
    _state["publisher"] = WeightPublisher.attach(group, merged_shards(model))
    return int(_state["publisher"].nbytes)


def train_and_publish(version: int) -> bool:
    """One step, then publish; whether it changed all that this rank holds of the adapter, and no more."""
    before = _held()
    _logits().float().square().mean().backward()  # type: ignore[no-untyped-call]
    _state["optimizer"].step()
    _state["optimizer"].zero_grad()
    _state["publisher"].publish(version)
    changed = [not torch.equal(old, new) for old, new in zip(before, _held(), strict=True)]
    return changed == [p.requires_grad for p in _state["parameters"]]


def next_tokens() -> list[int]:
    """The greedy next token after each of the prompts."""
    with torch.no_grad():
        return list(map(int, _logits()[:, -1].argmax(-1)))


def prompts() -> list[list[int]]:
    """What ``next_tokens`` goes on from."""
    return PROMPTS


def close() -> None:
    """Leave the group."""
    _state["publisher"].close()


def _logits() -> torch.Tensor:
    logits: torch.Tensor = _state["model"](input_ids=torch.tensor(PROMPTS)).logits
    return logits


def _held() -> list[torch.Tensor]:
    """What this rank holds of every parameter, copied."""
    parameters = (parameter.detach() for parameter in _state["parameters"])
    return [(p.to_local() if isinstance(p, DTensor) else p).clone() for p in parameters]
