"""What the tests ask of a running SGLang server."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx

from rdt_core import WeightSync
from tests.e2e.processes import API_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.processes import Server, Trainer

LONG = 900  # tokens; seconds of generation, so that what a test does next falls into it
PROMPTS = ([3, 14, 15, 92], [65, 35, 89, 79, 32, 38, 46], [2])
NUM_TOKENS = 12


@contextmanager
def connect(server: Server, trainer: Trainer) -> Iterator[WeightSync]:
    # Data-parallel ranks of one server land alike, and read together.
    with WeightSync.connect(trainer.group, [server.url], api_key=API_KEY, fan_out="always") as sync:
        yield sync


def ask_all(server: Server) -> list[list[int]]:
    return [ask(server, prompt, NUM_TOKENS)["output_ids"] for prompt in PROMPTS]


def ask(server: Server, prompt: list[int], num_tokens: int, **more: Any) -> dict[str, Any]:
    answer = server.post("/generate", generation(prompt, num_tokens) | more)
    assert answer.is_success, answer.text
    return dict(answer.json())


def generation(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling}


def auth_mode() -> str:
    """How the tests' Ray cluster authenticates: what a driver tells an engine."""
    return os.environ.get("RAY_AUTH_MODE", "")


def next_version(server: Server, trainer: Trainer | None = None) -> int:
    """Servers and trainers outlive tests, and versions only grow."""
    return 1 + max(trainer.version if trainer else 0, *(int(rank["version"]) for rank in ranks_of(server)))


def ranks_of(server: Server) -> list[dict[str, Any]]:
    """What every rank says of itself."""
    return list(server.get("/rdt/status").json()["ranks"])


@contextmanager
def stream(server: Server, prompt: list[int], num_tokens: int) -> Iterator[Iterator[dict[str, Any]]]:
    """One greedy answer, chunk by chunk as the server makes it; each holds all tokens so far."""
    body = generation(prompt, num_tokens) | {"stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        yield (json.loads(line.removeprefix("data: ")) for line in lines)
