"""``python -m sglang.launch_server --weight-sync rdt`` beside a trainer process, over Ray and NIXL."""

from __future__ import annotations

import signal
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core.errors import RdtError, UpdateFailedError
from tests.e2e.processes import Server, Trainer, start_trainer
from tests.e2e.sglang.asking import LONG, PROMPTS, ask, ask_all, auth_mode, connect, next_version, stream
from tests.e2e.sglang.conftest import LOADED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rdt_core import WeightSync

pytestmark = pytest.mark.slow


def test_after_every_sync_the_server_answers_as_one_that_loaded_those_weights(
    server: Server,
    trainer: Trainer,
    family: str,
    checkpoint: Callable[[str, int], Path],
    request: pytest.FixtureRequest,
) -> None:
    seen: dict[int, list[list[int]]] = {}
    with connect(server, trainer) as sync:
        for version, seed in enumerate((1, 0, 1, 0), start=next_version(server, trainer)):
            trainer.publish(checkpoint(family, seed), version)
            report = sync.update(version=version)
            answers = ask_all(server)
            assert answers == seen.setdefault(seed, answers)
            assert answers == LOADED.get((family, seed), answers)
            assert 0 < report.commit_s <= report.stall_s
            assert sync.verify().bytes_equal
            assert server.get("/model_info").json()["weight_version"] == str(version)
            # Data-parallel ranks read together.
            has_neighbours = any(row.neighbours_nbytes for row in report.ranks)
            assert has_neighbours == ("dp2" in request.node.name)
    assert seen[0] != seen[1]


def test_requests_in_flight_survive_a_commit(
    server: Server, trainer: Trainer, family: str, checkpoint: Callable[[str, int], Path]
) -> None:
    version = next_version(server, trainer)
    with connect(server, trainer) as sync, ThreadPoolExecutor(2) as pool:
        trainer.publish(checkpoint(family, 1), version)
        running = [pool.submit(ask, server, prompt, LONG) for prompt in PROMPTS[:2]]
        with stream(server, PROMPTS[0], LONG) as chunks:
            next(chunks)
            sync.update(version=version)
            last = list(chunks)[-1]
        done = [last, *(future.result(timeout=120) for future in running)]
    for answer in done:
        assert len(answer["output_ids"]) == LONG
        assert answer["meta_info"]["finish_reason"]["type"] == "length"


def spans_over_a_commit(
    server: Server, trainer: Trainer, sync: WeightSync, old: Path, new: Path
) -> tuple[int, list[dict[str, Any]]]:
    """The version before a commit in mid-request, and that request's spans of versions."""
    version = next_version(server, trainer)
    trainer.publish(old, version)
    sync.update(version=version)
    trainer.publish(new, version + 1)
    with stream(server, PROMPTS[0], LONG) as chunks:
        next(chunks)
        # So that the commit falls into the request, if that has not ended already on a machine that is slow.
        assert server.post("/pause_generation", {"mode": "retract"}).is_success
        try:
            sync.update(version=version + 1)
        finally:
            assert server.post("/continue_generation").is_success
        return version, list(chunks)[-1]["meta_info"]["weight_versions"]


def test_tokens_before_and_after_a_commit_carry_the_version_that_made_them(
    server: Server, trainer: Trainer, family: str, checkpoint: Callable[[str, int], Path]
) -> None:
    with connect(server, trainer) as sync:
        old, new = checkpoint(family, 1), checkpoint(family, 0)
        tries = (spans_over_a_commit(server, trainer, sync, old, new) for _ in range(5))
        version, spans = next(seen for seen in tries if len(seen[1]) > 1)
    assert [span["version"] for span in spans] == [str(version), str(version + 1)], spans
    assert (spans[0]["start"], spans[1]["end"]) == (0, LONG)
    assert spans[0]["end"] == spans[1]["start"]


@pytest.mark.parametrize("mode", ["staged", "inplace"])
def test_the_servers_own_update_route_carries_out_a_whole_update(
    server: Server,
    trainer: Trainer,
    family: str,
    ray_address: str,
    mode: str,
    checkpoint: Callable[[str, int], Path],
) -> None:
    body = {"group": trainer.group, "mode": mode, "ray_address": ray_address, "ray_auth_mode": auth_mode()}
    answers = []
    for seed in (1, 0):
        version = next_version(server, trainer)
        trainer.publish(checkpoint(family, seed), version)
        label = {"version": version, "weight_version": f"step-{version}", "flush_cache": seed == 0}
        done = server.post("/update_weights_from_rdt", body | label)
        assert done.is_success, done.text
        assert {rank["mode"] for rank in done.json()["ranks"]} == {mode}
        assert server.get("/model_info").json()["weight_version"] == f"step-{version}"
        answers.append(ask_all(server))
    assert answers[0] != answers[1] == LOADED.get((family, 0), answers[1])


def test_a_trainer_that_dies_fails_the_update_by_name_and_another_one_can_take_over(
    server: Server,
    mortal: Trainer,
    family: str,
    ray_address: str,
    checkpoint: Callable[[str, int], Path],
) -> None:
    version = next_version(server, mortal)
    with connect(server, mortal) as sync:
        mortal.publish(checkpoint(family, 1), version)
        sync.update(version=version)
        before = ask_all(server)
        mortal.publish(checkpoint(family, 0), version + 1)
        mortal.process.send_signal(signal.SIGKILL)
        mortal.process.wait(10)
        with pytest.raises(UpdateFailedError, match=f"version {version + 1} failed in prepare"):
            sync.update(version=version + 1, timeout_s=20)
        assert ask_all(server) == before
    with start_trainer(f"{mortal.group}-again", ray_address, checkpoint(family, 0)) as other:
        other.publish(checkpoint(family, 0), version + 2)
        with connect(server, other) as sync:
            sync.update(version=version + 2)
            assert ask_all(server) != before
            assert sync.verify().bytes_equal


def test_another_models_checkpoint_is_refused_at_connect_and_the_server_goes_on(
    server: Server, family: str, ray_address: str, checkpoint: Callable[[str, int], Path]
) -> None:
    before = ask_all(server)
    other_family = "qwen3" if family == "qwen3_moe" else "qwen3_moe"
    group = f"group-{uuid.uuid4().hex[:8]}"
    with start_trainer(group, ray_address, checkpoint(other_family, 0)) as other:
        other.publish(checkpoint(other_family, 0), next_version(server, other))
        with pytest.raises(RdtError, match="same model"), connect(server, other):
            pass
    assert ask_all(server) == before
