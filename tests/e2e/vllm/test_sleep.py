"""A vLLM server that sleeps: nobody touches its weights until they are there again."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core import WeightSync
from rdt_core.errors import EngineAsleepError, UpdateFailedError
from tests.e2e.processes import API_KEY, Server, start_trainer
from tests.e2e.vllm.conftest import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

FAMILY = "qwen3"
PROMPT = [3, 14, 15, 92]


@pytest.fixture(scope="module")
def server(checkpoint: Callable[[str, int], Path]) -> Iterator[Server]:
    """A server of two workers in vLLM's development mode, which has the routes for sleeping.

    The CPU's workers go through all of it and keep their memory.
    """
    flags = ["--weight-sync", "rdt", "-tp", "2", "--dtype", "float32"]
    with serve(checkpoint(FAMILY, 0), *flags, env={"VLLM_SERVER_DEV_MODE": "1"}) as started:
        yield started


def ask(server: Server) -> str:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", body)
    assert answer.is_success, answer.text
    return str(answer.json()["choices"][0]["text"])


def are_asleep(server: Server) -> list[bool]:
    ranks: list[dict[str, Any]] = server.get("/rdt/status").json()["ranks"]
    return [rank["is_asleep"] for rank in ranks]


def test_a_server_that_sleeps_is_not_touched_and_takes_the_next_version_when_its_weights_are_there(
    server: Server, ray_address: str, checkpoint: Callable[[str, int], Path]
) -> None:
    group = f"group-{uuid.uuid4().hex[:8]}"
    with (
        start_trainer(group, ray_address, checkpoint(FAMILY, 0)) as trainer,
        WeightSync.connect(group, engines=[server.url], api_key=API_KEY) as sync,
    ):
        trainer.publish(checkpoint(FAMILY, 1), 1)
        sync.update(1)
        of_version_1 = ask(server)
        assert server.post("/sleep?level=1").is_success
        assert are_asleep(server) == [True, True]
        trainer.publish(checkpoint(FAMILY, 2), 2)
        with pytest.raises(UpdateFailedError) as caught:
            sync.update(2)
        assert caught.value.phase == "prepare"
        assert isinstance(caught.value.__cause__, EngineAsleepError)
        assert server.post("/rdt/commit", {"version": 2}).status_code == 409
        assert server.post("/wake_up?tags=weights").is_success
        assert are_asleep(server) == [False, False]
        sync.update(2)
        assert sync.verify().bytes_equal
        assert server.post("/wake_up?tags=kv_cache").is_success
        assert ask(server) != of_version_1
        # What it says now is what it says after an update that nobody slept through.
        trainer.publish(checkpoint(FAMILY, 1), 3)
        sync.update(3)
        assert ask(server) == of_version_1
