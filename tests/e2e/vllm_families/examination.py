"""Records a family's loader in vLLM, replays the recording, and compares every byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rdt_core.recorder import record_loader
from tests.e2e.vllm_families.families import build_model, load_checkpoint
from tests.integration.loader_models import picture, pour, replay, specs_of

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One family's outcome, for a table in the documentation."""

    family: str
    num_tensors: int
    num_shards: int
    num_fills: int
    reload: dict[str, str]
    differing: list[str]

    def __str__(self) -> str:
        verdict = "equal" if not self.differing else f"DIFFER in {self.differing}"
        reload = f", reload {self.reload}" if self.reload else ""
        return (
            f"{self.family}: {self.num_tensors} tensors in {self.num_shards} shards, "
            f"{self.num_fills} fills{reload}; bytes {verdict}"
        )


def examine(family: str, folder: Path, *, tp_size: int = 1) -> Row:
    """Record a family's loader, replay, and compare with what the loader itself writes. A few seconds."""
    tensors = load_checkpoint(folder)
    model = build_model(folder, tp_size)
    pour(model)
    before = picture(model)
    load: Any = model.load_weights
    recording = record_loader(model, specs_of(tensors), skippable=lambda name: is_tied(model, name))
    assert picture(model) == before
    replay(recording, tensors, load)
    replayed = picture(model)
    pour(model)
    with torch.no_grad():
        load((name, tensor.clone()) for name, tensor in tensors.items())
    loaded = picture(model)
    return Row(
        family=family,
        num_tensors=len(tensors),
        num_shards=len(recording.shards),
        num_fills=len(recording.fills),
        reload=dict(recording.reload),
        differing=[name for name, expected in loaded.items() if replayed[name] != expected],
    )


def is_tied(model: torch.nn.Module, name: str) -> bool:
    return name == "lm_head.weight" and bool(getattr(model.config, "tie_word_embeddings", False))
