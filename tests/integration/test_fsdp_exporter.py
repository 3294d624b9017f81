"""The FSDP2 exporter in worlds of two and four real gloo ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from rdt_core.models.config import parse_config
from rdt_core.models.parameter import build_manifest
from rdt_core.models.specs import TRAINERS, make_trainer, parse_spec
from rdt_core.models.units import describe_model
from rdt_megatron import fsdp_shards
from tests.integration.rank_world import RankWorld

if TYPE_CHECKING:
    from collections.abc import Iterator

_CASES = "tests.integration.fsdp_cases"
_MIB = 1 << 20
_IMPORT_TIMEOUT_S = 280.0  # transformers, in every rank at once, on a busy machine


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankWorld]:
    world = RankWorld(2, _CASES, tmp_path_factory.mktemp("two"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankWorld]:
    world = RankWorld(4, _CASES, tmp_path_factory.mktemp("four"))
    yield world
    world.close()


@pytest.mark.parametrize("case", ["even_and_uneven_rows", "shards_of_dim_one", "kept_after_forward"])
def test_regions_equal_the_gathered_tensors_and_stay_put_over_three_steps(two: RankWorld, case: str) -> None:
    two.run(case)


def test_uneven_rows_are_cut_as_fsdp_pads_them_and_empty_ranks_export_nothing(four: RankWorld) -> None:
    regions = four.run("even_and_uneven_rows")
    embedding = [rank.get("embed.weight") for rank in regions]
    assert embedding == ["[0:3, 0:6]", "[3:6, 0:6]", "[6:9, 0:6]", "[9:10, 0:6]"]
    assert [rank.get("scale") for rank in regions] == ["[0:1]", "[1:2]", "[2:3]", None]


def test_hsdp_replicas_describe_equal_regions(four: RankWorld) -> None:
    regions = four.run("hsdp")
    assert regions[0] == regions[2]
    assert regions[1] == regions[3]
    assert regions[0] != regions[1]


def test_tensor_parallel_under_fsdp_is_cut_by_tensor_parallel_first(four: RankWorld) -> None:
    regions = four.run("tensor_parallel_under_fsdp")
    rows = [rank["blocks.0.up.weight"] for rank in regions]
    assert rows == ["[0:5, 0:8]", "[10:15, 0:8]", "[5:10, 0:8]", "[15:20, 0:8]"]
    columns = [rank["blocks.0.down.weight"] for rank in regions]
    assert columns == ["[0:4, 0:10]", "[0:4, 10:20]", "[4:8, 0:10]", "[4:8, 10:20]"]


def test_a_bfloat16_model_is_exported_as_bfloat16(two: RankWorld) -> None:
    assert {dtype for rank in two.run("bfloat16") for dtype in rank.values()} == {"bfloat16"}


def test_mixed_precision_exports_the_float32_shards(two: RankWorld) -> None:
    assert {dtype for rank in two.run("mixed_precision") for dtype in rank.values()} == {"float32"}


def test_tied_parameters_appear_once_and_frozen_ones_too(two: RankWorld) -> None:
    for rank in two.run("tied_and_frozen"):
        assert "head.weight" not in rank
        assert "blocks.0.up.weight" in rank


def test_an_unsharded_root_still_yields_the_sharded_addresses(two: RankWorld) -> None:
    two.run("root_left_unsharded")


def test_a_smaller_mesh_after_forward_still_yields_the_training_mesh(four: RankWorld) -> None:
    four.run("smaller_mesh_after_forward")


def test_wrapper_prefixes_are_not_part_of_names(two: RankWorld) -> None:
    assert all(rank["same"] for rank in two.run("wrapped_layers"))


def test_parameters_that_fsdp_ignores_are_exported_whole_by_every_rank(two: RankWorld) -> None:
    assert [rank["head.weight"] for rank in two.run("ignored_parameters")] == ["[0:10, 0:6]"] * 2


def test_locate_notices_exactly_the_parameters_that_were_assigned_anew(two: RankWorld) -> None:
    for moved in two.run("moved_by_assign"):
        assert "head.weight" in moved
        assert "embed.weight" not in moved


def test_locate_notices_a_local_tensor_that_its_dtensor_no_longer_holds(two: RankWorld) -> None:
    assert two.run("moved_within_its_dtensor") == [["head.weight"]] * 2


@pytest.mark.parametrize(
    "case", ["flat_cases.flat_parameters", "flat_cases.flat_parameters_without_original_ones"]
)
def test_fsdp1_cuts_inside_of_rows_and_every_cut_is_at_most_three_boxes(two: RankWorld, case: str) -> None:
    ranks = two.run(case)
    assert any("[" in box and len(rank[name]) > 1 for rank in ranks for name in rank for box in rank[name])
    assert max(len(boxes) for rank in ranks for boxes in rank.values()) <= 3


def test_what_every_rank_holds_whole_is_exported_by_every_rank(two: RankWorld) -> None:
    assert {
        len(boxes) for rank in two.run("flat_cases.flat_parameters_kept_whole") for boxes in rank.values()
    } == {1}
    first, second = two.run("distributed_data_parallel")
    assert first == second


def test_uneven_tensor_parallel_parts_are_cut_one_by_one(four: RankWorld) -> None:
    rows = [rank["0.weight"] for rank in four.run("uneven_tensor_parallel_under_fsdp")]
    assert rows == ["[0:4, 0:3]", "[7:10, 0:3]", "[4:7, 0:3]", "[10:13, 0:3]"]


def test_names_are_mapped_by_the_given_function(two: RankWorld) -> None:
    assert all(name.startswith("model.") for rank in two.run("renamed") for name in rank)


@pytest.mark.parametrize(
    ("case", "tensor", "reason"),
    [
        ("refuses_meta", "scale", "meta device"),
        ("refuses_integers", "codes", "torch.int8"),
        ("refuses_separate_runs", "rows", "separate runs"),
        ("refuses_eight_bit_floats", "scaled", "float8_e4m3fn"),
        ("refuses_released_memory", "blocks.0.up.weight", "has been released"),
        ("refuses_offloaded_shards", "offloaded", "offloaded to cpu from a mesh of cuda"),
        ("flat_cases.refuses_offloaded_flat_parameters", "the model", "offloads it to the CPU"),
    ],
)
def test_what_cannot_be_described_is_refused_by_name(
    two: RankWorld, case: str, tensor: str, reason: str
) -> None:
    for refused, names_its_rank, why, remedy in two.run(case):
        assert refused == tensor
        assert names_its_rank
        assert reason in why
        assert remedy.endswith(".")


def test_describing_a_model_takes_memory_that_does_not_grow_with_it(two: RankWorld) -> None:
    for growth in two.run("attach_memory"):
        small, large = sorted(map(int, growth))
        assert large > 100 * _MIB > _MIB > small, "the sizes are too close to tell"
        assert growth[str(large)] < 2 * _MIB


@pytest.mark.parametrize(
    "case",
    [
        "rebuilt_cases.llama_rebuilt",
        "rebuilt_cases.tied_qwen3_rebuilt",
        "rebuilt_cases.qwen3_moe_rebuilt",
        "rebuilt_cases.mixtral_rebuilt",
    ],
)
def test_a_transformers_model_rebuilt_from_live_regions_gives_equal_logits(two: RankWorld, case: str) -> None:
    for rank, answer in enumerate(two.run(case, timeout_s=_IMPORT_TIMEOUT_S)):
        assert_equal_logits(answer)
        # What `rdt plan` and `rdt simulate` take for granted is what a real rank describes.
        model = describe_model(parse_config(answer["config"]))
        layout = make_trainer(parse_spec("fsdp:dp=2", TRAINERS), model)
        expected = [[s.tensor, str(s.region)] for s in build_manifest(layout, rank, "node").shards]
        assert answer["regions"] == sorted(expected)


def test_a_transformers_model_rebuilt_from_flat_parameters_gives_equal_logits(two: RankWorld) -> None:
    for answer in two.run("rebuilt_cases.flat_rebuilt", timeout_s=_IMPORT_TIMEOUT_S):
        assert_equal_logits(answer)


@pytest.mark.parametrize(
    "case", ["rebuilt_cases.hsdp_rebuilt", "rebuilt_cases.tensor_parallel_under_fsdp_rebuilt"]
)
def test_the_same_on_meshes_of_four_ranks(four: RankWorld, case: str) -> None:
    for answer in four.run(case, timeout_s=_IMPORT_TIMEOUT_S):
        assert_equal_logits(answer)


def assert_equal_logits(answer: dict[str, Any]) -> None:
    """As described before training, and with the same description after three steps."""
    for when in ("at first", "after steps"):
        assert answer[when] == {"same_names": True, "same_logits": True}, when


def test_a_model_in_one_process_is_exported_whole() -> None:
    model = nn.Linear(3, 2)
    local = fsdp_shards(model)
    assert (local.rank, local.world_size) == (0, 1)
    assert [(s.spec.name, s.spec.shape, str(s.region)) for s in local.shards] == [
        ("weight", (2, 3), "[0:2, 0:3]"),
        ("bias", (2,), "[0:2]"),
    ]
    with torch.no_grad():
        model.weight.fill_(7.0)
    assert bool((local.shards[0].data == 7.0).all())
