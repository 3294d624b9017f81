"""Everything that a driver may do wrong or that may fail beside it, against a live server under load.

Each gets an error of one sentence and a fitting status; the old version serves on, the next update works, and
no generation fails that nobody asked to abort.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from rdt_core.errors import RdtError
from tests.e2e.processes import API_KEY, Server, Trainer, start_trainer
from tests.e2e.sglang.asking import (
    NUM_TOKENS,
    PROMPTS,
    ask,
    auth_mode,
    connect,
    generation,
    next_version,
    ranks_of,
    stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("case", ["tp2-moe"], indirect=True)]

BEARER = {"Authorization": f"Bearer {API_KEY}"}


class Load:
    """Keeps asking for tokens until it is stopped; notes every answer that is not whole."""

    def __init__(self, server: Server) -> None:
        self.num_done, self.failures = 0, list[str]()
        self._server, self._stop = server, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        body = generation(PROMPTS[0], 24)
        while not self._stop.is_set():
            answer = httpx.post(f"{self._server.url}/generate", json=body, timeout=120)
            if not answer.is_success or len(answer.json()["output_ids"]) != 24:
                self.failures.append(answer.text)
            self.num_done += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive()


@pytest.fixture
def load(server: Server) -> Iterator[Load]:
    running = Load(server)
    yield running
    running.stop()
    assert running.failures == []
    assert running.num_done > 0


def update(server: Server, **body: Any) -> httpx.Response:
    return server.post("/update_weights_from_rdt", body)


def sentence_of(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    message = str(body.get("message") or body.get("detail") or body["error"]["message"])
    assert "\n" not in message
    return message


def serves_on(server: Server, trainer: Trainer, address: str, folder: Path) -> None:
    """The server takes another version from the trainer by its own route."""
    version = next_version(server, trainer)
    trainer.publish(folder, version)
    done = update(
        server, group=trainer.group, version=version, ray_address=address, ray_auth_mode=auth_mode()
    )
    assert done.is_success, done.text
    assert done.json()["success"] is True
    assert server.get("/model_info").json()["weight_version"] == str(version)


@pytest.mark.usefixtures("load")
def test_requests_that_cannot_be_meant_are_refused_one_by_one(
    server: Server,
    trainer: Trainer,
    ray_address: str,
    family: str,
    checkpoint: Callable[[str, int], Path],
) -> None:
    where = {"ray_address": ray_address, "ray_auth_mode": auth_mode()}
    before = ask(server, PROMPTS[1], NUM_TOKENS)["output_ids"]
    assert "no-such-group" in sentence_of(update(server, group="no-such-group", version=1, **where), 404)
    for body in (
        {"group": 7, "version": 1},
        {"group": "g", "version": "1"},
        {"group": "g", "version": 0},
        {"group": "g", "version": 1, "flush_cache": "yes"},
        {"group": "g", "version": 1, "mode": "sideways"},
        {"group": "g", "version": 1, "colour": "red"},
        {"group": "g", "version": 1, "timeout_s": -1},
        {"version": 1},
    ):
        sentence_of(update(server, **body), 400)
    sentence_of(httpx.post(f"{server.url}/update_weights_from_rdt", content="[", headers=BEARER), 400)
    assert server.post("/rdt/commit", {"version": 10**9}).status_code == 409
    assert update_without_a_key(server).status_code == 401
    assert ask(server, PROMPTS[1], NUM_TOKENS)["output_ids"] == before
    serves_on(server, trainer, ray_address, checkpoint(family, 1))
    version = trainer.version
    assert str(version) in sentence_of(update(server, group=trainer.group, version=version, **where), 409)


def update_without_a_key(server: Server) -> httpx.Response:
    return server.post("/update_weights_from_rdt", {"group": "g", "version": 1}, key=None)


@pytest.mark.usefixtures("load")
def test_a_body_of_a_gigabyte_is_cut_off(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1024):
            yield b" " * 2**20

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
        answer = httpx.post(
            f"{server.url}/update_weights_from_rdt", content=endless(), headers=BEARER, timeout=120
        )
        sentence_of(answer, 413)
    assert server.get("/rdt/status").is_success


@pytest.mark.usefixtures("load")
def test_two_updates_at_once_are_both_answered_and_one_takes_effect(
    server: Server,
    trainer: Trainer,
    ray_address: str,
    family: str,
    checkpoint: Callable[[str, int], Path],
) -> None:
    version = next_version(server, trainer)
    trainer.publish(checkpoint(family, 0), version)
    where = {"ray_address": ray_address, "ray_auth_mode": auth_mode()}
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(update, server, group=trainer.group, version=version, **where) for _ in range(2)]
        answers = [future.result(120) for future in asked]
    assert any(answer.is_success for answer in answers)
    for answer in answers:
        assert answer.is_success or sentence_of(answer, answer.status_code)
    states = ranks_of(server)
    assert {(state["version"], state["is_torn"]) for state in states} == {(version, False)}
    serves_on(server, trainer, ray_address, checkpoint(family, 1))


def test_a_server_whose_weights_are_released_is_not_touched_and_takes_the_next_version_when_they_are_back(
    server: Server,
    trainer: Trainer,
    ray_address: str,
    family: str,
    checkpoint: Callable[[str, int], Path],
) -> None:
    """The CPU's schedulers go through all of it and keep their memory."""
    serves_on(server, trainer, ray_address, checkpoint(family, 1))
    of_the_next = ask(server, PROMPTS[0], NUM_TOKENS)["output_ids"]
    serves_on(server, trainer, ray_address, checkpoint(family, 0))
    assert ask(server, PROMPTS[0], NUM_TOKENS)["output_ids"] != of_the_next
    where = {"group": trainer.group, "ray_address": ray_address, "ray_auth_mode": auth_mode()}
    version = next_version(server, trainer)
    trainer.publish(checkpoint(family, 1), version)
    released = {"tags": ["weights", "kv_cache"]}
    assert server.post("/release_memory_occupation", released).is_success
    assert [state["is_asleep"] for state in ranks_of(server)] == [True, True]
    assert "sleeps" in sentence_of(update(server, version=version, **where), 409)
    assert server.post("/resume_memory_occupation", {"tags": ["weights"]}).is_success
    done = update(server, version=version, **where)
    assert done.is_success, done.text
    assert server.post("/resume_memory_occupation", {"tags": ["kv_cache"]}).is_success
    assert {(state["version"], state["is_asleep"]) for state in ranks_of(server)} == {(version, False)}
    assert ask(server, PROMPTS[0], NUM_TOKENS)["output_ids"] == of_the_next


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_an_update_of_a_paused_server_takes_effect_and_leaves_it_paused(
    server: Server,
    trainer: Trainer,
    ray_address: str,
    family: str,
    mode: str,
    checkpoint: Callable[[str, int], Path],
) -> None:
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, server, PROMPTS[0], 200)
        assert server.post("/pause_generation", {"mode": mode}).is_success
        serves_on(server, trainer, ray_address, checkpoint(family, 1))
        waiting = pool.submit(ask, server, PROMPTS[1], 4)
        assert server.post("/continue_generation").is_success
        assert len(waiting.result(120)["output_ids"]) == 4
        if mode != "abort":
            assert len(running.result(120)["output_ids"]) == 200


@pytest.mark.usefixtures("load")
def test_connecting_twice_and_leaving_while_reading_do_no_harm(
    server: Server,
    trainer: Trainer,
    ray_address: str,
    family: str,
    checkpoint: Callable[[str, int], Path],
) -> None:
    body = {"group": trainer.group, "ray_address": ray_address, "ray_auth_mode": auth_mode()}
    for _ in range(2):
        assert server.post("/rdt/connect", body).is_success
    version = next_version(server, trainer)
    trainer.publish(checkpoint(family, 1), version)
    assert server.post("/rdt/prepare", {"version": version, "attempt": "mine"}).is_success
    assert server.post("/rdt/disconnect").is_success
    assert server.post("/rdt/disconnect").is_success
    assert "connect" in sentence_of(server.post("/rdt/commit", {"version": version}), 409)
    assert ranks_of(server)[0]["group"] is None
    serves_on(server, trainer, ray_address, checkpoint(family, 0))


@pytest.mark.usefixtures("load")
def test_a_trainer_that_is_gone_at_connect_is_named(
    server: Server, ray_address: str, family: str, checkpoint: Callable[[str, int], Path]
) -> None:
    with start_trainer("leaves-early", ray_address, checkpoint(family, 0)) as gone:
        gone.process.kill()
        gone.process.wait(10)
        body = {"ray_address": ray_address, "ray_auth_mode": auth_mode(), "timeout_s": 15}
        answer = server.post("/rdt/connect", {"group": "leaves-early", **body})
    assert answer.status_code >= 400, answer.text
    assert "\n" not in str(answer.json()["error"]["message"])


@pytest.mark.usefixtures("load")
def test_a_trainer_that_dies_between_read_and_commit_is_not_missed(
    server: Server, mortal: Trainer, family: str, checkpoint: Callable[[str, int], Path], ray_address: str
) -> None:
    body = {"group": mortal.group, "ray_address": ray_address, "ray_auth_mode": auth_mode()}
    assert server.post("/rdt/connect", body).is_success
    version = next_version(server, mortal)
    mortal.publish(checkpoint(family, 0), version)
    assert server.post("/rdt/prepare", {"version": version}).is_success
    mortal.process.kill()
    mortal.process.wait(10)
    assert server.post("/rdt/commit", {"version": version}).is_success
    assert server.get("/model_info").json()["weight_version"] == str(version)


@pytest.mark.usefixtures("load")
def test_one_rank_that_cannot_read_fails_the_update_on_all(
    server: Server,
    trainer: Trainer,
    ray_address: str,
    family: str,
    fault: Path,
    checkpoint: Callable[[str, int], Path],
) -> None:
    serves_on(server, trainer, ray_address, checkpoint(family, 1))
    before = ask(server, PROMPTS[1], NUM_TOKENS)["output_ids"]
    version = next_version(server, trainer)
    with connect(server, trainer) as sync:
        trainer.publish(checkpoint(family, 0), version)
        fault.write_text("read 1")
        with pytest.raises(RdtError, match="injected into read of rank 1"):
            sync.update(version=version)
        fault.write_text("")
        assert server.post("/rdt/commit", {"version": version}).status_code == 409
        assert ask(server, PROMPTS[1], NUM_TOKENS)["output_ids"] == before
        sync.update(version=version)
        assert ask(server, PROMPTS[1], NUM_TOKENS)["output_ids"] != before


def test_one_rank_that_fails_in_a_commit_holds_generation_until_a_commit_succeeds_on_all(
    server: Server,
    trainer: Trainer,
    ray_address: str,
    family: str,
    fault: Path,
    checkpoint: Callable[[str, int], Path],
) -> None:
    serves_on(server, trainer, ray_address, checkpoint(family, 1))
    version = next_version(server, trainer)
    with connect(server, trainer) as sync, stream(server, PROMPTS[0], 400) as running:
        trainer.publish(checkpoint(family, 0), version)
        next(running)
        fault.write_text("commit 1")
        with pytest.raises(RdtError, match="injected into commit of rank 1"):
            sync.update(version=version)
        fault.write_text("")
        states = ranks_of(server)
        assert [state["is_torn"] for state in states] == [False, True]
        server.post("/continue_generation")
        refused = server.post("/generate", generation(PROMPTS[1], 4))
        assert "parts of two versions" in sentence_of(refused, 503)
        trainer.publish(checkpoint(family, 0), version + 1)
        sync.update(version=version + 1)
        assert sync.verify().bytes_equal
        assert list(running)[-1]["meta_info"]["finish_reason"]["type"] in ("abort", "length")
    assert len(ask(server, PROMPTS[1], 4)["output_ids"]) == 4
