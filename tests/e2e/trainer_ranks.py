"""Trainer ranks at work beside a server of another layout: Megatron-core, or FSDP2 with a LoRA adapter."""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core import WeightSync
from tests.e2e.processes import API_KEY, START_TIMEOUT_S
from tests.integration.rank_world import RankWorld

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tests.e2e.processes import Server

NUM_VERSIONS = 5
PYTHON = "RDT_MEGATRON_PYTHON"
MEGATRON = "tests.megatron.publishing"
LORA = "tests.integration.lora_publishing"


@contextlib.contextmanager
def attached_ranks(
    ray_address: str,
    model: Path,
    logs: Path,
    options: Mapping[str, Any],
    *,
    cases: str = MEGATRON,
    num_ranks: int = 4,
) -> Iterator[tuple[str, RankWorld]]:
    """Processes of the environment with Megatron-core, which is not the engine's, and their group.

    Args:
        ray_address: of the cluster that both sides join.
        model: folder of the checkpoint whose configuration is trained.
        logs: folder for what the ranks print.
        options: of their ``attach``.
        cases: module of what they do.
        num_ranks: how many.
    """
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"{PYTHON} does not name an interpreter with Megatron-core; nox sets it")
    group = f"group-{uuid.uuid4().hex[:8]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_address)
        ranks = RankWorld(num_ranks, cases, logs, python=python)
        try:
            held = ranks.run("attach", group, str(model), dict(options), timeout_s=START_TIMEOUT_S)
            assert all(held), "a rank holds nothing"
            yield group, ranks
            ranks.run("close")
        finally:
            ranks.close()


def check_versions(
    server: Server, group: str, ranks: RankWorld, next_token: Callable[[list[int]], int]
) -> None:
    """Train and sync several versions; compare every byte, and what the engine generates from each.

    Args:
        server: of the engine.
        group: of the ranks.
        ranks: attached.
        next_token: asks the engine for its greedy next token after a prompt.
    """
    prompts = ranks.run("prompts")[0]
    # The server outlives its trainers, and versions only grow.
    first = 1 + max(int(rank["version"]) for rank in server.get("/rdt/status").json()["ranks"])
    with WeightSync.connect(group, engines=[server.url], api_key=API_KEY) as sync:
        for version in range(first, first + NUM_VERSIONS):
            assert all(ranks.run("train_and_publish", version)), "training left a parameter as it was"
            sync.update(version=version)
            verified = sync.verify()
            assert verified.bytes_equal
            assert not verified.unverified
            # The logits of the last pipeline stage are in the last rank.
            assert [next_token(prompt) for prompt in prompts] == ranks.run("next_tokens")[-1]
