"""Megatron-core ranks in worlds of one, two and four processes: their live views are the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.rank_world import RankWorld
from tests.megatron.configurations import CONFIGURATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CASES = "tests.megatron.cases"


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
    answers = world_of(CONFIGURATIONS[name].num_ranks).run(name)
    for answer in answers:
        assert answer["unchanged"] == []
