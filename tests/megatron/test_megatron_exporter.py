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
    configuration = CONFIGURATIONS[name]
    answers = world_of(configuration.num_ranks).run(name)
    for rank, answer in enumerate(answers):
        assert answer["unchanged"] == []
        if is_known(configuration):
            # What `rdt plan` and `rdt simulate` take for granted is what a real rank describes.
            expected = expected_regions(configuration, answer["hf_values"], rank)
            assert without_cut(configuration, answer["regions"]) == expected
