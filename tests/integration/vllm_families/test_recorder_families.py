"""The recorder against vLLM's own loaders: every byte of every parameter and buffer, family by family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: its loaders cannot be recorded")

from rdt_core.recorder import record_loader
from tests.integration.loader_models import picture, pour, replay, specs_of
from tests.integration.vllm_families.families import (
    FAMILIES,
    build_model,
    save_checkpoint,
    start_vllm,
    stop_vllm,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
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


def examine(family: str, folder: Path) -> Row:
    """Record a family's loader, replay, and compare with what the loader itself writes. A few seconds."""
    tensors = save_checkpoint(family, folder)
    model = build_model(folder)
    pour(model)
    before = picture(model)
    recording = record_loader(
        model, specs_of(tensors), model.load_weights, skippable=lambda name: is_tied(model, name)
    )
    assert picture(model) == before
    replay(recording, tensors, model.load_weights)
    replayed = picture(model)
    pour(model)
    with torch.no_grad():
        model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
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


def rows(folder: Path) -> list[Row]:
    """The outcome of every family, for the documentation's table. A minute; this process becomes a vLLM world."""
    start_vllm(folder)
    try:
        return [examine(family, folder / str(number)) for number, family in enumerate(FAMILIES)]
    finally:
        stop_vllm()


@pytest.fixture(scope="module")
def vllm_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    start_vllm(tmp_path_factory.mktemp("world"))
    yield
    stop_vllm()


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_world")
@pytest.mark.filterwarnings("ignore")  # vLLM and transformers deprecate among themselves
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_loader_is_recorded_to_the_byte(family: str, tmp_path: Path) -> None:
    row = examine(family, tmp_path)
    print(row)  # noqa: T201  # the family's line of the table, shown by pytest -s or on failure
    assert not row.differing
    assert not row.reload
