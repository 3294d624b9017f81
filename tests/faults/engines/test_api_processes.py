"""A vLLM with two API processes (``--api-server-count 2``): each refuses while the engine is torn."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

from rdt_core import WeightSync
from rdt_core.errors import RdtError
from tests.e2e.processes import API_KEY, start_trainer
from tests.faults.engines.test_real_engines import gates_env, say
from tests.local_group import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.processes import Server

NUM_ASKED = 16
"""Every request is a connection of its own, which the kernel gives to one of the two processes."""


def say_often(server: Server) -> list[list[int] | None]:
    """What the server says to each of many requests; None where it refuses."""
    return [say(server) for _ in range(NUM_ASKED)]


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed here")
def test_every_api_process_serves_each_update_refuses_while_the_engine_is_torn_and_serves_again(
    checkpoint: Callable[[str, int], Path], ray_address: str, tmp_path: Path
) -> None:
    from tests.e2e.vllm.conftest import serve

    flags = ("--weight-sync", "rdt", "--dtype", "float32", "--api-server-count", "2")
    with (
        start_trainer("two-api-processes", ray_address, checkpoint("qwen3", 0)) as trainer,
        serve(checkpoint("qwen3", 0), *flags, env=gates_env(tmp_path)) as server,
        WeightSync.connect(trainer.group, [server.url], api_key=API_KEY) as sync,
    ):
        said = []
        for version in (1, 2):
            trainer.publish(checkpoint("qwen3", version), version)
            sync.update(version)
            answers = say_often(server)
            assert answers == [answers[0]] * NUM_ASKED
            said.append(answers[0])
        assert said[0] != said[1]
        assert None not in said
        (tmp_path / "during commit.raise").touch()
        trainer.publish(checkpoint("qwen3", 0), 3)
        with pytest.raises(RdtError, match="as a test wanted"):
            sync.update(3)
        wait_for(lambda: say_often(server) == [None] * NUM_ASKED)
        trainer.publish(checkpoint("qwen3", 1), 4)
        sync.update(4)
        wait_for(lambda: say_often(server) == [said[0]] * NUM_ASKED)
        assert sync.verify().bytes_equal
