"""Megatron-core ranks in worlds of one, two and four processes: their live views are the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.rank_world import RankWorld
from tests.megatron.configurations import CONFIGURATIONS
from tests.megatron.simulated import expected_regions, is_known, without_cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CASES = "tests.megatron.cases"
_TIMEOUT_S = 500.0  # a world's first case starts its processes

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def world_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankWorld]]:
    """A world by its number of ranks, started on first use; one at a time, for the sake of memory."""
    current: dict[int, RankWorld] = {}

    def find(num_ranks: int) -> RankWorld:
        if num_ranks not in current:
            for other in current.values():
                other.close()
            current.clear()
            current[num_ranks] = RankWorld(num_ranks, _CASES, tmp_path_factory.mktemp(f"ranks-{num_ranks}"))
        return current[num_ranks]

    yield find
    for world in current.values():
        world.close()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_model_rebuilt_from_live_views_gives_equal_logits_before_and_after_training(
    world_of: Callable[[int], RankWorld], name: str
) -> None:
    c = CONFIGURATIONS[name]
    answers = world_of(c.num_ranks).run("rebuild_before_and_after_training", name, timeout_s=_TIMEOUT_S)
    for rank, answer in enumerate(answers):
        if "skipped" in answer:
            pytest.skip(answer["skipped"])
        assert answer["unchanged"] == []
        assert answer["is_direct"] == c.is_direct
        if is_known(c):
            # What `rdt plan` and `rdt simulate` take for granted is what a real rank describes.
            expected = expected_regions(c, answer["hf_values"], rank)
            assert without_cut(c, answer["regions"]) == expected
        if c.distributed_optimizer:
            kinds = set(answer["dtypes"].values())
            num_biases = sum("e_score_correction_bias" in tensor for tensor in answer["dtypes"])
            assert answer["num_windows"] <= 2 * len(kinds) + num_biases, (
                "one buffer a dtype and kind of layer"
            )


def test_routers_and_their_biases_stay_in_float32_beside_bfloat16(
    world_of: Callable[[int], RankWorld],
) -> None:
    name = "DP2, bfloat16, float32 routers"
    for answer in world_of(2).run("rebuild_before_and_after_training", name, timeout_s=_TIMEOUT_S):
        wide = {tensor for tensor, dtype in answer["dtypes"].items() if dtype == "float32"}
        assert wide == {tensor for tensor in answer["dtypes"] if ".mlp.gate." in tensor}
        assert len(wide) == 2 * 3, "three layers have a router, with a weight and a bias"


def test_parameters_of_an_overlapped_gather_are_completed_by_refresh(
    world_of: Callable[[int], RankWorld],
) -> None:
    for rank in world_of(2).run("an_overlapped_gather_is_incomplete_until_it_is_refreshed"):
        assert rank == {"before": False, "after": True}


def test_what_engines_do_not_load_can_be_skipped(world_of: Callable[[int], RankWorld]) -> None:
    (names,) = world_of(1).run("without_parameters_that_engines_do_not_load")
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_locate_notices_exactly_the_parameter_that_moved(world_of: Callable[[int], RankWorld]) -> None:
    assert world_of(1).run("moved_parameters") == [["decoder.layers.2.self_attention.linear_proj.weight"]]


_FC2 = "decoder.layers.1.mlp.linear_fc2"


@pytest.mark.parametrize(
    ("spoiled", "tensor", "reason"),
    [
        ("no rule", f"{_FC2}.scale", "rdt_megatron.families.qwen3 has no rule for it"),
        ("meta", f"{_FC2}.weight", "meta device"),
        ("integers", f"{_FC2}.weight", "torch.int8"),
        ("quantized", f"{_FC2}.weight", "_Quantized"),
        ("not contiguous", f"{_FC2}.weight", "not contiguous"),
        ("another shape", f"{_FC2}.weight", "1 dims, expected 2"),
        ("released", f"{_FC2}.weight", "has been released"),
        ("untied", "the model", "tie_word_embeddings is True"),
        ("unknown model", "the model", "no family serves model type 'gpt9'"),
        ("zero-centred", "the model", "distance from one"),
        ("another checkpoint", "the model", "num_hidden_layers is 5"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_parameter_rank_and_remedy(
    world_of: Callable[[int], RankWorld], spoiled: str, tensor: str, reason: str
) -> None:
    ((refused, rank, why, remedy),) = world_of(1).run("refused", spoiled)
    assert (refused, rank) == (tensor, 0)
    assert reason in why
    assert remedy.endswith(".")
