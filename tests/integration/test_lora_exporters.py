"""The exporters for LoRA against what PEFT itself saves and merges, in a world of two gloo ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.rank_world import RankWorld

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLOAT_NBYTES = 4
# Of make_net: an embedding of 10 rows and, in either block, two matrices of 14 by 6.
_ADAPTED_NBYTES = _FLOAT_NBYTES * (10 * 6 + 2 * 2 * 14 * 6)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankWorld]:
    world = RankWorld(2, "tests.integration.lora_cases", tmp_path_factory.mktemp("lora"))
    yield world
    world.close()


@pytest.mark.parametrize(
    "case",
    ["adapter_in_one_process", "adapter_under_fsdp2", "adapter_under_fsdp1"],
)
def test_an_adapter_is_exported_as_peft_saves_it_and_stays_live_over_three_steps(
    two: RankWorld, case: str
) -> None:
    names = {name for rank in two.run(case) for name in rank}
    assert "base_model.model.blocks.1.up.lora_A.weight" in names
    assert "base_model.model.embed.lora_embedding_B" in names
    assert "base_model.model.head.weight" in names
    assert not any("default" in name or "base_layer" in name for name in names)


def test_an_adapter_that_is_not_active_is_exported_under_the_same_names(two: RankWorld) -> None:
    for names in two.run("adapter_that_is_not_active"):
        assert "base_model.model.blocks.1.up.lora_A.weight" in names
        assert not any("other" in name for name in names)


def test_magnitudes_of_weight_decomposition_are_named_as_peft_saves_them(two: RankWorld) -> None:
    for names in two.run("adapter_of_weight_decomposition"):
        assert "base_model.model.blocks.0.up.lora_magnitude_vector" in names


def test_biases_of_an_adapter_are_exported_under_ddp_too(two: RankWorld) -> None:
    for names in two.run("adapter_under_ddp"):
        assert "base_model.model.blocks.0.up.lora_B.bias" in names


@pytest.mark.parametrize(("case", "num_holders"), [("merged_in_one_process", 2), ("merged_under_fsdp2", 1)])
def test_merged_copies_equal_what_peft_merges_and_only_adapted_weights_are_copied(
    two: RankWorld, case: str, num_holders: int
) -> None:
    assert sum(two.run(case)) == num_holders * _ADAPTED_NBYTES


def test_merged_copies_can_be_filled_while_fsdp_has_its_root_gathered(two: RankWorld) -> None:
    two.run("merged_after_an_evaluation")


@pytest.mark.parametrize(
    ("case", "tensor", "reason", "remedy"),
    [
        ("refuses_the_sum", "base_model.model.embed", "lies nowhere in memory", "merged_shards(model)"),
        ("refuses_an_unknown_adapter", "adapter 'missing'", "default, other", "adapter="),
        ("refuses_a_model_without_adapters", "adapter 'default'", "none at all", "adapter="),
        ("refuses_other_kinds", "adapter 'default'", "IA3", "LoRA"),
        (
            "refuses_what_is_trained_besides",
            "base_model.model.blocks.0.norm.weight",
            "trained beside the adapter",
            "modules_to_save",
        ),
        (
            "refuses_to_merge_weight_decomposition",
            "base_model.model.blocks.0.up",
            "DoraLinearVariant",
            "adapter_shards(model)",
        ),
        ("refuses_to_merge_flat_parameters", "base_model.model.embed", "cuts its factors", "adapter_shards"),
        (
            "refuses_to_merge_twice",
            "base_model.model.embed.base_layer.weight",
            "PEFT has merged default",
            "unmerge_adapter()",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name_with_the_option_that_does_it(
    two: RankWorld, case: str, tensor: str, reason: str, remedy: str
) -> None:
    for refused, why, instead in two.run(case):
        assert refused == tensor
        assert reason in why
        assert remedy in instead
