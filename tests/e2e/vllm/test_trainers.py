"""Versions of trainers of other makes in one vLLM server: Megatron-core, and FSDP2 with a LoRA adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.trainer_ranks import LORA, attached_ranks, check_versions
from tests.e2e.vllm.conftest import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.processes import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str, int], Path]) -> Path:
    return checkpoint("qwen3", 0)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """A server of two ranks, which follows one trainer after the other."""
    with serve(model, "--weight-sync", "rdt", "-tp", "2", "--dtype", "float32") as server:
        yield server


def test_every_version_arrives_byte_by_byte_and_the_engine_goes_on_as_the_trainer_would(
    ray_address: str, server: Server, model: Path, tmp_path: Path
) -> None:
    sizes = {"tp": 2, "pp": 2, "distributed_optimizer": True}
    with attached_ranks(ray_address, model, tmp_path, sizes) as (group, ranks):
        check_versions(server, group, ranks, lambda prompt: next_token(server, prompt))


def test_an_engine_without_adapters_follows_a_lora_trainer_by_its_merged_weights(
    ray_address: str, server: Server, model: Path, tmp_path: Path
) -> None:
    adapter = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8}
    with attached_ranks(ray_address, model, tmp_path, adapter, cases=LORA, num_ranks=2) as (group, ranks):
        check_versions(server, group, ranks, lambda prompt: next_token(server, prompt))


def next_token(server: Server, prompt: list[int]) -> int:
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    answer = server.post("/v1/completions", {**body, "ignore_eos": True})
    assert answer.is_success, answer.text
    (token,) = answer.json()["choices"][0]["token_ids"]
    return int(token)
