"""Every rank has every rank's answer, whatever the answers' sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from rdt_sglang.gathering import FIRST_BYTES, gather_plain

if TYPE_CHECKING:
    from pathlib import Path

# torch warns of what it deprecates itself.
pytestmark = pytest.mark.filterwarnings("default")

NUM_RANKS = 3
SIZES = (0, 1, FIRST_BYTES - 64, FIRST_BYTES, 3 * FIRST_BYTES + 1)


def answer_of(rank: int, size: int) -> dict[str, Any]:
    """Every rank's is of another size; one has as much as asked."""
    text = "x" * (size if rank == 1 else rank)
    return {"ok": rank != 2, "rank": rank, "result": {"text": text, "trainers": {0: "nixl"}, "at": 0.25}}


def gather_and_compare(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_RANKS)
    group = distributed.group.WORLD
    assert group is not None
    for size in SIZES:
        expected = [answer_of(other, size) for other in range(NUM_RANKS)]
        assert gather_plain(answer_of(rank, size), group) == expected
    distributed.destroy_process_group()


def test_answers_of_all_sizes_arrive_on_all_ranks(tmp_path: Path) -> None:
    spawn(gather_and_compare, (f"file://{tmp_path}/meeting",), NUM_RANKS)  # type: ignore[no-untyped-call]  # torch's own
