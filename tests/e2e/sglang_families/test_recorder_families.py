"""The recorder against SGLang's own loaders: every byte of every tensor, family by family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed: its loaders cannot be recorded")

from rdt_core.derived import refresh
from rdt_sglang.finalize import find_hooks
from tests.e2e.family_checkpoints import FAMILIES, load_checkpoint, save_checkpoint
from tests.e2e.family_examination import Row, examine
from tests.e2e.sglang_families.families import build_model

if TYPE_CHECKING:
    from pathlib import Path

# Tensors that go through SGLang's own loader at every version: it derives a second buffer from each.
RELOADED = {"Gemma 2": "norm.weight"}


# SGLang computes rotary embeddings of DeepSeek on a CPU in this form only.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LATENT = {"rope_parameters": YARN, "moe_layer_freq": 1}

# What SGLang's models read beside what transformers' configurations hold.
SETTINGS: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": {**LATENT, "scoring_func": "softmax"},
    "DeepSeek-V3": {**LATENT, "scoring_func": "sigmoid"},
    "Gemma 2": {"hidden_act": "gelu_pytorch_tanh"},
}


def rows(folder: Path) -> list[Row]:
    """The outcome of every family, for a table in the documentation."""
    return [examine_family(family, folder / str(n)) for n, family in enumerate(FAMILIES)]


def examine_family(family: str, folder: Path) -> Row:
    save_checkpoint(family, folder, **SETTINGS.get(family, {}))
    model = build_model(folder, attention="triton" if family == "gpt-oss" else "torch_native")

    def finalize() -> None:
        for hook in find_hooks(model):
            refresh(hook)

    return examine(family, model, load_checkpoint(folder), finalize=finalize)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # SGLang and transformers deprecate among themselves
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_loader_is_recorded_to_the_byte(family: str, tmp_path: Path) -> None:
    row = examine_family(family, tmp_path)
    print(row)  # noqa: T201  # the family's line of the table, shown by pytest -s or on failure
    assert not row.differing
    assert all(name.endswith(RELOADED.get(family, "nothing")) for name in row.reload)
