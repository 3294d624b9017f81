"""Versions of a Megatron-core trainer of a mixture of experts in an SGLang server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.sglang.asking import ask
from tests.e2e.trainer_ranks import attached_ranks, check_versions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.processes import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Megatron trains experts under tensor parallelism only where it cuts the sequence as well. Stacked experts
# lie transposed in the trainer, so that an arena packs them.
SIZES = {
    "tp": 2,
    "pp": 2,
    "etp": 2,
    "sequence_parallel": True,
    "experts": "stacked",
    "distributed_optimizer": True,
}


@pytest.mark.parametrize("case", ["tp2-moe"], indirect=True)
def test_every_version_arrives_byte_by_byte_and_the_engine_goes_on_as_the_trainer_would(
    ray_address: str, server: Server, family: str, checkpoint: Callable[[str, int], Path], tmp_path: Path
) -> None:
    with attached_ranks(ray_address, checkpoint(family, 0), tmp_path, SIZES) as (group, ranks):
        check_versions(server, group, ranks, lambda p: int(ask(server, p, 1)["output_ids"][0]))
