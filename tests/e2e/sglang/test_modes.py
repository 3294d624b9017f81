"""Pipelines of two stages behind two tokenizer workers, on a cluster that is known when they start."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.e2e.processes import start_trainer
from tests.e2e.sglang.asking import PROMPTS, ask, ask_all, auth_mode, connect, ranks_of
from tests.e2e.sglang.conftest import serve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rdt_core import WeightSync
    from tests.e2e.processes import Server, Trainer

pytestmark = pytest.mark.slow

FLAGS = ["--pp-size", "2", "--tokenizer-worker-num", "2", "--sleep-on-idle", "--weight-sync", "rdt"]
# Two schedulers, and four.
CASES = (
    pytest.param((), 2, id="pp2"),
    pytest.param(("--tp", "2"), 4, id="pp2-tp2", marks=pytest.mark.wide),
    pytest.param(("--dp", "2"), 4, id="pp2-dp2", marks=pytest.mark.wide),
)
NUM_TOKENS = 200


@pytest.mark.parametrize(("more", "num_ranks"), CASES)
def test_a_pipeline_gets_ready_before_it_serves_and_flips_all_its_stages_between_two_micro_batches(
    more: tuple[str, ...], num_ranks: int, ray_address: str, checkpoint: Callable[[str, int], Path]
) -> None:
    first, second = checkpoint("qwen3", 0), checkpoint("qwen3", 1)
    group = f"group-{uuid.uuid4().hex[:8]}"
    env = {"RAY_ADDRESS": ray_address, "RAY_AUTH_MODE": auth_mode()}
    with start_trainer(group, ray_address, first) as trainer, serve(first, *FLAGS, *more, env=env) as server:
        ready = ranks_of(server)
        assert [rank["is_in_cluster"] for rank in ready] == [True] * num_ranks
        assert all(rank["num_recorded"] > 0 for rank in ready)
        with connect(server, trainer) as sync:
            loaded = ask_all(server)
            flip_under_load(server, trainer, sync, second, "recompute")
            assert ask_all(server) != loaded
            flip_under_load(server, trainer, sync, first, "keep")
            trainer.publish(first, trainer.version + 1)
            report = sync.update(version=trainer.version)
            assert ask_all(server) == loaded
            check_status(server, group, report.version, num_ranks)
            hold_and_flip(server, trainer, sync, second)


def flip_under_load(server: Server, trainer: Trainer, sync: WeightSync, folder: Path, kv_cache: str) -> None:
    """Requests in flight on both micro-batches go on over a commit, and every stage has every byte."""
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, server, [*PROMPTS[0], client], NUM_TOKENS) for client in range(4)]
        trainer.publish(folder, trainer.version + 1)
        sync.update(version=trainer.version, kv_cache=kv_cache)
        assert all(len(future.result(240)["output_ids"]) == NUM_TOKENS for future in running)
    assert sync.verify().bytes_equal


def check_status(server: Server, group: str, version: int, num_ranks: int) -> None:
    status = server.get("/rdt/status").json()
    assert (status["group"], status["version"]) == (group, version)
    last = status["last_sync"]
    assert (last["version"], [rank["rank"] for rank in last["ranks"]]) == (version, [*range(num_ranks)])
    assert 0 < last["commit_s"] <= last["stall_s"]
    commits = [rank["last_commit"] for rank in status["ranks"]]
    assert all(0 <= commit["drain_s"] <= commit["stall_s"] for commit in commits)


def hold_and_flip(server: Server, trainer: Trainer, sync: WeightSync, folder: Path) -> None:
    """A user's pause, which SGLang's own pipeline does not heed, holds every stage, over a commit too."""
    with ThreadPoolExecutor(1) as pool:
        assert server.post("/pause_generation", {"mode": "in_place"}).is_success
        trainer.publish(folder, trainer.version + 1)
        sync.update(version=trainer.version)
        waiting = pool.submit(ask, server, PROMPTS[1], 4)
        assert ranks_of(server)[0]["version"] == trainer.version
        assert not waiting.done()
        assert server.post("/continue_generation").is_success
        spans = waiting.result(240)["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == [str(trainer.version)]
