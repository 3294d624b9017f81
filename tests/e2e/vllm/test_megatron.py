"""Versions of a Megatron-core trainer in a vLLM server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.megatron import attached_ranks, check_versions
from tests.e2e.vllm.conftest import serve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.processes import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_version_arrives_byte_by_byte_and_the_engine_goes_on_as_the_trainer_would(
    ray_address: str, checkpoint: Callable[[str, int], Path], tmp_path: Path
) -> None:
    model = checkpoint("qwen3", 0)
    with (
        attached_ranks(ray_address, model, tmp_path, tp=2, pp=2, distributed_optimizer=True) as (
            group,
            ranks,
        ),
        serve(model, "--weight-sync", "rdt", "-tp", "2", "--dtype", "float32") as server,
    ):
        check_versions(server, group, ranks, 1, lambda prompt: next_token(server, prompt))


def next_token(server: Server, prompt: list[int]) -> int:
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    answer = server.post("/v1/completions", {**body, "ignore_eos": True})
    assert answer.is_success, answer.text
    (token,) = answer.json()["choices"][0]["token_ids"]
    return int(token)
