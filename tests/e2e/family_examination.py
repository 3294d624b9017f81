"""Records the loader of an engine's model, replays the recording, and compares every byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rdt_core.recorder import record_loader
from tests.integration.loader_models import picture, pour, replay, specs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


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


def examine(
    family: str,
    model: Any,
    tensors: Mapping[str, torch.Tensor],
    *,
    finalize: Callable[[], None] = lambda: None,
) -> Row:
    """Record a family's loader, replay, and compare with what the loader itself writes. A few seconds.

    Compared are parameters, buffers, and tensors that the loader leaves in plain attributes.

    Args:
        family: its name.
        model: of the engine, not loaded.
        tensors: of a checkpoint.
        finalize: what the adapter does after the copies of a commit.
    """
    pour(model)
    before = picture(model)
    load: Any = model.load_weights
    recording = record_loader(model, specs_of(tensors), skippable=lambda name: is_tied(model, name))
    assert picture(model) == before
    replay(recording, tensors, load)
    finalize()
    replayed = picture(model) | attributes(model)
    pour(model)
    with torch.no_grad():
        load((name, tensor.clone()) for name, tensor in tensors.items())
    loaded = picture(model) | attributes(model)
    return Row(
        family=family,
        num_tensors=len(tensors),
        num_shards=len(recording.shards),
        num_fills=len(recording.fills),
        reload=dict(recording.reload),
        differing=[name for name, expected in loaded.items() if replayed.get(name) != expected],
    )


def attributes(model: torch.nn.Module) -> dict[str, bytes]:
    """Every byte of the tensors that modules hold beside their parameters and buffers."""
    return {
        f"{path}.{name}": value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


def is_tied(model: torch.nn.Module, name: str) -> bool:
    return name == "lm_head.weight" and bool(getattr(model.config, "tie_word_embeddings", False))
