"""Other ways in which SGLang spreads over processes. Run by nox session e2e-sglang-extra."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest

from tests.e2e.processes import start_trainer
from tests.e2e.sglang.asking import ask_all, auth_mode, connect
from tests.e2e.sglang.conftest import serve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.extra]

MODES = {
    "tokenizer-workers": ["--tokenizer-worker-num", "2"],
    "ray-actors": ["--use-ray"],
}


@pytest.mark.parametrize("mode", MODES)
def test_a_server_in_this_mode_follows_a_trainer(
    mode: str, ray_address: str, checkpoint: Callable[[str, int], Path]
) -> None:
    first, second = checkpoint("qwen3", 0), checkpoint("qwen3", 1)
    group = f"group-{uuid.uuid4().hex[:8]}"
    # Here it is SGLang itself that joins Ray, so it has to know how.
    ray_env = {"RAY_ADDRESS": ray_address, "RAY_AUTH_MODE": auth_mode()}
    env = ray_env if mode == "ray-actors" else {}
    flags = ["--weight-sync", "rdt", "--sleep-on-idle", *MODES[mode]]
    with (
        start_trainer(group, ray_address, first) as trainer,
        serve(first, *flags, env=env) as server,
        connect(server, trainer) as sync,
    ):
        loaded = ask_all(server)
        trainer.publish(second, 1)
        sync.update(version=1)
        assert sync.verify().bytes_equal
        assert ask_all(server) != loaded
        trainer.publish(first, 2)
        sync.update(version=2)
        assert ask_all(server) == loaded
