"""Names of parameters in the bare model, and of the checkpoint tensors that they hold."""

from __future__ import annotations

import pytest

from rdt_core.coverage import find_overlap, find_uncovered
from rdt_core.region import Region
from rdt_megatron.hf_names import FAMILIES, UnknownFamilyError, name_unfused, split_fused
from rdt_megatron.names import strip_wrappers


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("_orig_mod.layers.0._checkpoint_wrapped_module.norm.weight", "layers.0.norm.weight"),
        ("module.module.embed.weight", "embed.weight"),
        ("_orig_mod.module.embed.weight", "embed.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
    ],
)
def test_wrappers_leave_no_mark_in_names(wrapped: str, bare: str) -> None:
    assert strip_wrappers(wrapped) == bare


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize(("suffix", "shape"), [("gate_up_proj", (3, 8, 5)), ("down_proj", (3, 5, 4))])
def test_pieces_of_fused_experts_cover_the_parameter_exactly(
    model_type: str, suffix: str, shape: tuple[int, ...]
) -> None:
    pieces = list(split_fused(f"model.layers.1.mlp.experts.{suffix}", shape, model_type))
    regions = [piece.region for piece in pieces]
    assert find_overlap(regions) is None
    assert find_uncovered(Region.whole(shape), regions) is None
    assert len({piece.name for piece in pieces}) == len(pieces)


def test_gate_comes_before_up() -> None:
    names = [piece.name for piece in split_fused("l.mlp.experts.gate_up_proj", (1, 4, 2), "qwen3_moe")]
    assert names == ["l.mlp.experts.0.gate_proj.weight", "l.mlp.experts.0.up_proj.weight"]


def test_fused_experts_of_an_unknown_family_are_refused() -> None:
    with pytest.raises(UnknownFamilyError, match="'newest_moe'"):
        name_unfused("model.layers.0.mlp.experts.gate_up_proj", "newest_moe")


def test_a_model_that_is_not_from_transformers_keeps_its_names() -> None:
    assert name_unfused("blocks.0.experts.w", None) == "blocks.0.experts.w"


def test_a_fused_parameter_has_no_name_of_its_own() -> None:
    assert name_unfused("model.layers.1.mlp.experts.down_proj", "mixtral") is None
    assert name_unfused("model.layers.1.mlp.gate.weight", "mixtral") == (
        "model.layers.1.block_sparse_moe.gate.weight"
    )
