"""After a sync, an engine is what vLLM would be had it loaded a checkpoint of the same weights.

Compared are all tensors that modules, attention backends and expert kernels hold, so a stale absorbed
projection or packed copy cannot pass, and greedy answers, also with a stock vLLM in its own CPU layouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

# What each family derives from its weights on a CPU, of which at least these must have been compared. The
# absorbed projections have other names on a processor with AMX.
DERIVED: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "deepseek_v2": (
        ("mla_attn.W_UK_T", "impl._w_uk_packed"),
        ("mla_attn.W_UV", "impl._w_uv_packed"),
        "experts.rdt_packed_w13",
        "experts.rdt_packed_w2",
    ),
    "llama": (),
    "qwen3": (),
    "qwen3_moe": ("experts.rdt_packed_w13", "experts.rdt_packed_w2"),
}


@pytest.mark.parametrize("family", DERIVED)
def test_two_syncs_in_a_row_leave_what_loading_the_last_checkpoint_would(
    family: str, checkpoint: Callable[[str, int], Path], run_probe: Callable[..., list[dict[str, Any]]]
) -> None:
    first, second, third = (checkpoint(family, seed) for seed in range(3))
    seen = run_probe("--backend", "rdt", "--model", first, "--sync", second, third)
    (loaded,) = run_probe("--backend", "rdt", "--model", third)

    assert len({str(observed["answers"]) for observed in seen}) == 3
    assert seen[-1]["answers"] == loaded["answers"]
    assert seen[-1]["state"] == loaded["state"]
    for part in DERIVED[family]:
        names = [name for name in loaded["state"] if name.endswith(part)]
        assert names, part
        assert all(seen[-1]["state"][name] != seen[0]["state"][name] for name in names)


@pytest.mark.parametrize("family", DERIVED)
def test_plain_layouts_say_what_stock_vllm_says_in_its_own(
    family: str, checkpoint: Callable[[str, int], Path], run_probe: Callable[..., list[dict[str, Any]]]
) -> None:
    """In float32: in bfloat16 kernels of other layouts break ties another way on some processors."""
    if family == "deepseek_v2" and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's attention for this family takes bfloat16 only on a processor with AMX")
    asked = ("--model", checkpoint(family, 2), "--dtype", "float32")
    (ours,) = run_probe("--backend", "rdt", *asked)
    (stock,) = run_probe(*asked)
    assert ours["answers"] == stock["answers"]


def test_without_the_backend_the_cpu_platform_packs_weights_as_it_always_did(
    checkpoint: Callable[[str, int], Path], run_probe: Callable[..., list[dict[str, Any]]]
) -> None:
    """Which of them it packs depends on the processor: with AVX-512 the linear layers, else none of these."""
    (idle,) = run_probe("--model", checkpoint("llama", 0))
    (stock,) = run_probe("--model", checkpoint("llama", 0), VLLM_PLUGINS="")
    assert idle == stock
