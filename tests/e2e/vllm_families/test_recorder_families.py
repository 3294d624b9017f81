"""The recorder against vLLM's own loaders: every byte of every parameter and buffer, family by family."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: its loaders cannot be recorded")

from tests.e2e.family_checkpoints import FAMILIES, load_checkpoint, save_checkpoint
from tests.e2e.family_examination import Row, examine
from tests.e2e.vllm_families.families import build_model, start_vllm, stop_vllm
from tests.integration.rank_world import RankWorld

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def rows(folder: Path) -> list[Row]:
    """The outcome of every family, for a table in the documentation. Makes this process a vLLM world."""
    start_vllm(folder)
    try:
        return [_save_and_examine(family, folder / str(n)) for n, family in enumerate(FAMILIES)]
    finally:
        stop_vllm()


def _save_and_examine(family: str, folder: Path) -> Row:
    save_checkpoint(family, folder)
    return examine(family, build_model(folder), load_checkpoint(folder))


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
    row = _save_and_examine(family, tmp_path)
    print(row)  # noqa: T201  # the family's line of the table, shown by pytest -s or on failure
    assert not row.differing
    assert not row.reload


@pytest.fixture(scope="module")
def tp_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankWorld]:
    world = RankWorld(2, "tests.e2e.vllm_families.tp_cases", tmp_path_factory.mktemp("tp"))
    yield world
    world.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt_oss", "qwen3_moe", "phi3"])
def test_both_tensor_parallel_ranks_are_recorded_to_the_byte(case: str, tp_world: RankWorld) -> None:
    for rank, answer in enumerate(tp_world.run(case, timeout_s=200.0)):
        print(f"tp_rank {rank} of 2, {answer['row']}")  # noqa: T201  # shown by pytest -s or on failure
        assert answer["differing"] == []
        assert answer["reload"] == {}
