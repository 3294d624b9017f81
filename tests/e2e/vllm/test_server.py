"""``vllm serve --weight-sync rdt`` beside a trainer process and a Ray cluster, over the real transport."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from rdt_core import WeightSync
from rdt_core.client import CoordinatorClient, RayChannel
from rdt_core.digest import RegionDigest, add_digests
from rdt_core.errors import NotPublishedError, RdtError, UpdateFailedError
from tests.e2e.processes import API_KEY, Server, Trainer, find_port, serve_command, start_trainer
from tests.e2e.vllm.conftest import serve
from tests.e2e.vllm.probe import NUM_TOKENS, PROMPTS
from tests.published import wait_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

FAMILY = "qwen3"  # tied embeddings; the other families are compared tensor by tensor in test_derived.py
LONG = 1000  # tokens; seconds of generation, so that what a test does next falls into it


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def server(request: pytest.FixtureRequest, checkpoint: Callable[[str, int], Path]) -> Iterator[Server]:
    """One server for all tests of a tensor-parallel size, started from seed 0, not in development mode."""
    # Scale-out adds the one route whose answers carry the weight version of every token.
    # In float32, where greedy answers do not depend on how tensor parallelism orders its sums.
    flags = ["--weight-sync", "rdt", "-tp", str(request.param), "--enable-scale-out", "--dtype", "float32"]
    with serve(checkpoint(FAMILY, 0), *flags) as started:
        yield started


@pytest.fixture
def trainer(ray_address: str, checkpoint: Callable[[str, int], Path]) -> Iterator[Trainer]:
    """A trainer of a group of its own."""
    with start_trainer(f"group-{uuid.uuid4().hex[:8]}", ray_address, checkpoint(FAMILY, 0)) as started:
        yield started


@pytest.fixture(scope="session")
def answers_of(
    checkpoint: Callable[[str, int], Path], run_probe: Callable[..., list[dict[str, Any]]]
) -> Callable[[int], list[list[int]]]:
    """The greedy answers of a stock vLLM that loaded the checkpoint of a seed."""
    known: dict[int, list[list[int]]] = {}

    def find(seed: int) -> list[list[int]]:
        if seed not in known:
            (loaded,) = run_probe("--model", checkpoint(FAMILY, seed), "--dtype", "float32")
            known[seed] = loaded["answers"]
        return known[seed]

    return find


@contextmanager
def connect(server: Server, trainer: Trainer) -> Iterator[WeightSync]:
    with WeightSync.connect(trainer.group, engines=[server.url], api_key=API_KEY) as sync:
        yield sync


def ask_all(server: Server) -> list[list[int]]:
    return [ask(server, prompt, NUM_TOKENS) for prompt in PROMPTS]


def ask(server: Server, prompt: str, num_tokens: int) -> list[int]:
    body: dict[str, Any] = {"model": "m", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
    answer = server.post("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
    assert answer.is_success, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def next_version(server: Server) -> int:
    """Servers outlive tests, and versions only grow."""
    return 1 + max(int(rank["version"]) for rank in server.get("/rdt/status").json()["ranks"])


def test_after_every_sync_the_server_answers_as_one_that_loaded_those_weights(
    server: Server,
    trainer: Trainer,
    checkpoint: Callable[[str, int], Path],
    answers_of: Callable[[int], list[list[int]]],
) -> None:
    with connect(server, trainer) as sync:
        for version, seed in enumerate((1, 2, 1), start=next_version(server)):
            trainer.publish(checkpoint(FAMILY, seed), version)
            report = sync.update(version=version)
            assert ask_all(server) == answers_of(seed)
            assert 0 < report.commit_s <= report.stall_s
            assert sync.verify().bytes_equal
            assert server.get("/weight_info").json() == {"weight_version": str(version)}
    assert answers_of(1) != answers_of(2)


def test_two_servers_on_one_node_read_every_byte_from_the_trainer_once(
    server: Server, trainer: Trainer, checkpoint: Callable[[str, int], Path], request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["server"] != 1:
        pytest.skip("one size of engine is enough: the other's ranks form two circles of the same kind")
    flags = ["--weight-sync", "rdt", "-tp", "1", "--enable-scale-out", "--dtype", "float32"]
    with serve(checkpoint(FAMILY, 0), *flags) as other:
        urls = [server.url, other.url]
        with WeightSync.connect(trainer.group, urls, api_key=API_KEY, fan_out="always") as sync:
            for version, seed in enumerate((1, 2), start=next_version(server)):
                trainer.publish(checkpoint(FAMILY, seed), version)
                report = sync.update(version=version)
                assert sync.verify().bytes_equal
                assert ask_all(server) == ask_all(other)
                nbytes = [sum(link.nbytes for link in row.links) for row in report.ranks]
                assert all(nbytes)
                assert sum(nbytes) == report.ranks[0].read_nbytes
                assert sum(row.neighbours_nbytes for row in report.ranks) > 0


def test_requests_in_flight_survive_a_commit(
    server: Server, trainer: Trainer, checkpoint: Callable[[str, int], Path]
) -> None:
    version = next_version(server)
    with connect(server, trainer) as sync, ThreadPoolExecutor(2) as pool:
        trainer.publish(checkpoint(FAMILY, 1), version)
        running = [pool.submit(ask, server, prompt, LONG) for prompt in PROMPTS[:2]]
        with stream(server, [3, 14], LONG) as chunks:
            first = next(chunks)
            sync.update(version=version)
            rest = list(chunks)
        assert [len(future.result(timeout=120)) for future in running] == [LONG] * 2
    assert sum(len(chunk["token_ids"]) for chunk in (first, *rest)) == LONG
    assert not server.get("/is_paused").json()["is_paused"]


def generate_body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """A request for one greedy answer by token ids."""
    sampling = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return {"token_ids": prompt, "sampling_params": sampling}


@contextmanager
def asked_without_a_pause(server: Server) -> Iterator[list[tuple[int, list[dict[str, Any]]]]]:
    """Three that ask until the block ends; then each answer's number of tokens and spans of versions.

    Answers of three lengths, so that they do not all end at once; whole ones, because an API process that
    sends a thousand chunks each is far behind its engine, which then stands idle for most of the time.
    """
    answers: list[tuple[int, list[dict[str, Any]]]] = []
    is_over = threading.Event()

    def ask_until_over(num_tokens: int) -> None:
        while not is_over.is_set():
            answer = server.post("/inference/v1/generate", generate_body([3, 14], num_tokens))
            answers.append((num_tokens, answer.json()["choices"][0]["weight_versions"]))

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_until_over, LONG - 250 * number) for number in range(3)]
        try:
            yield answers
        finally:
            is_over.set()
        for future in asking:
            future.result(120)


def test_tokens_before_and_after_a_commit_carry_the_version_that_made_them(
    server: Server, trainer: Trainer, checkpoint: Callable[[str, int], Path]
) -> None:
    first = next_version(server)
    with connect(server, trainer) as sync:
        trainer.publish(checkpoint(FAMILY, 0), first)
        sync.update(version=first)
        deadline, last = time.monotonic() + 60, first
        with asked_without_a_pause(server) as answers:
            while max((len(spans) for _, spans in answers), default=0) < 2 and time.monotonic() < deadline:
                last += 1
                trainer.publish(checkpoint(FAMILY, last % 2 + 1), last)
                sync.update(version=last)
    for num_tokens, spans in answers:
        starts, ends = [span["start"] for span in spans], [span["end"] for span in spans]
        assert [*starts, num_tokens] == [0, *ends]
        made_by = [int(span["version"]) for span in spans]
        assert made_by == list(range(made_by[0], made_by[0] + len(made_by)))
        assert first <= made_by[0] <= made_by[-1] <= last
    assert max(len(spans) for _, spans in answers) > 1


def test_an_update_of_a_paused_server_leaves_it_paused(
    server: Server, trainer: Trainer, checkpoint: Callable[[str, int], Path]
) -> None:
    version = next_version(server)
    with connect(server, trainer) as sync:
        trainer.publish(checkpoint(FAMILY, 1), version)
        server.post("/pause?mode=keep&clear_cache=false")
        sync.update(version=version)
        assert server.get("/is_paused").json()["is_paused"]
        server.post("/resume")
    assert server.get("/weight_info").json() == {"weight_version": str(version)}


def test_an_update_that_fails_leaves_the_old_version_serving_and_the_next_one_working(
    server: Server,
    trainer: Trainer,
    checkpoint: Callable[[str, int], Path],
    answers_of: Callable[[int], list[list[int]]],
) -> None:
    version = next_version(server)
    with connect(server, trainer) as sync:
        trainer.publish(checkpoint(FAMILY, 1), version)
        sync.update(version=version)
        with pytest.raises((NotPublishedError, RdtError)):
            sync.update(version=version + 1, timeout_s=2)
        assert ask_all(server) == answers_of(1)
        trainer.publish(checkpoint(FAMILY, 2), version + 2)
        sync.update(version=version + 2)
    assert ask_all(server) == answers_of(2)


def test_a_trainer_that_dies_fails_the_update_by_name_and_another_one_can_take_over(
    server: Server,
    trainer: Trainer,
    ray_address: str,
    checkpoint: Callable[[str, int], Path],
    answers_of: Callable[[int], list[list[int]]],
) -> None:
    version = next_version(server)
    with connect(server, trainer) as sync:
        trainer.publish(checkpoint(FAMILY, 1), version)
        sync.update(version=version)
        trainer.publish(checkpoint(FAMILY, 2), version + 1)
        wait_known(sync, version + 1)
        trainer.process.send_signal(signal.SIGKILL)
        trainer.process.wait(10)
        with pytest.raises(UpdateFailedError, match=f"version {version + 1} failed in prepare"):
            sync.update(version=version + 1, timeout_s=20)
        assert ask_all(server) == answers_of(1)
    with start_trainer(f"{trainer.group}-again", ray_address, checkpoint(FAMILY, 0)) as other:
        other.publish(checkpoint(FAMILY, 2), version + 2)
        with connect(server, other) as sync:
            sync.update(version=version + 2)
            assert ask_all(server) == answers_of(2)


def test_vllms_own_update_routes_carry_out_a_sync_and_recover_from_a_failed_one(
    server: Server,
    trainer: Trainer,
    ray_address: str,
    checkpoint: Callable[[str, int], Path],
    answers_of: Callable[[int], list[list[int]]],
) -> None:
    version = next_version(server)
    init = {"group": trainer.group, "ray_address": ray_address}
    trainer.publish(checkpoint(FAMILY, 1), version)
    assert server.post("/init_weight_transfer_engine", {"init_info": init}).is_success

    assert server.post("/start_weight_update").is_success
    refused = server.post("/update_weights", {"update_info": {"version": version + 1}})
    assert refused.json()["error"]["type"] == "NotPublishedError"

    assert server.post("/start_weight_update").is_success
    assert server.post("/update_weights", {"update_info": {"version": version}}).is_success
    assert server.post("/finish_weight_update", {"weight_version": "mine"}).is_success
    server.post("/pause?mode=keep&clear_cache=true")
    server.post("/resume")
    assert ask_all(server) == answers_of(1)
    assert server.get("/weight_info").json() == {"weight_version": "mine"}
    assert server.post("/shutdown_weight_transfer_engine").is_success


def test_a_gateway_syncs_while_requests_run_and_leaves_nothing_paused_or_connected(
    server: Server, trainer: Trainer, ray_address: str, checkpoint: Callable[[str, int], Path]
) -> None:
    version, pair = next_version(server), {"pair_name": "p"}
    with gateway(ray_address) as http, ThreadPoolExecutor(2) as pool:
        connect = {**pair, "group": trainer.group, "inference_worker_urls": [server.url]}
        assert http.post("/connect", json=connect).json()["num_engines"] == 1
        trainer.publish(checkpoint(FAMILY, 1), version)
        running = [pool.submit(ask, server, prompt, LONG) for prompt in PROMPTS[:2]]
        with stream(server, [3, 14], LONG) as chunks:
            first = next(chunks)
            done = http.post("/update_weights", json={**pair, "version": version})
            rest = list(chunks)
        assert (done.status_code, done.json()["status"]) == (200, "ok"), done.text
        assert [len(future.result(timeout=120)) for future in running] == [LONG] * 2
        assert sum(len(chunk["token_ids"]) for chunk in (first, *rest)) == LONG
        assert http.post("/update_weights", json={**pair, "version": version}).json() == done.json()
        late = http.post("/update_weights", json={**pair, "version": version + 1, "timeout_s": 1.0})
        assert (late.status_code, late.json()["inference_weights_may_be_mutated"]) == (409, False)
        assert not server.get("/is_paused").json()["is_paused"]
        assert len(ask(server, PROMPTS[0], NUM_TOKENS)) == NUM_TOKENS
        assert http.post("/disconnect", json=pair).status_code == 200
    ranks = server.get("/rdt/status").json()["ranks"]
    assert [(rank["group"], rank["version"]) for rank in ranks] == [(None, version)] * len(ranks)


@contextmanager
def gateway(ray_address: str) -> Iterator[httpx.Client]:
    """A client of a gateway process of this cluster."""
    port, key = find_port(), uuid.uuid4().hex
    keys = {"RDT_GATEWAY_API_KEY": key, "RDT_ENGINE_API_KEY": API_KEY, "RAY_ADDRESS": ray_address}
    command = [sys.executable, "-m", "rdt_core.gateway", "--host", "127.0.0.1", "--port", str(port)]
    with (
        serve_command(command, port, ready="/health", env={**os.environ, **keys}) as started,
        httpx.Client(base_url=started.url, headers={"Authorization": f"Bearer {key}"}, timeout=120) as client,
    ):
        yield client


def test_another_models_checkpoint_is_refused_at_connect_and_the_server_goes_on(
    server: Server, ray_address: str, checkpoint: Callable[[str, int], Path]
) -> None:
    before = ask_all(server)
    with start_trainer(f"group-{uuid.uuid4().hex[:8]}", ray_address, checkpoint("qwen3_moe", 0)) as other:
        other.publish(checkpoint("qwen3_moe", 0), next_version(server))
        with pytest.raises(RdtError, match="same model"), connect(server, other):
            pass
    assert ask_all(server) == before


@contextmanager
def stream(server: Server, prompt: list[int], num_tokens: int) -> Iterator[Iterator[dict[str, Any]]]:
    """One greedy answer by token ids, chunk by chunk as the server makes it."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    url = f"{server.url}/inference/v1/generate"
    with httpx.stream(
        "POST", url, json=generate_body(prompt, num_tokens) | {"stream": True}, headers=headers, timeout=120
    ) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        chunks = (json.loads(line.removeprefix("data: ")) for line in lines)
        yield (chunk["choices"][0] for chunk in chunks if chunk.get("choices"))


@pytest.mark.parametrize("server", [2], indirect=True, ids=["tp2"])
def test_a_server_that_joins_after_the_trainers_died_gets_every_byte_from_one_of_another_layout(
    server: Server,
    trainer: Trainer,
    checkpoint: Callable[[str, int], Path],
    answers_of: Callable[[int], list[list[int]]],
) -> None:
    version = next_version(server)
    flags = ["--weight-sync", "rdt", "--dtype", "float32"]
    with serve(checkpoint(FAMILY, 0), *flags) as late, connect(server, trainer) as sync:
        trainer.publish(checkpoint(FAMILY, 1), version)
        sync.update(version=version)
        trainer.process.send_signal(signal.SIGKILL)
        trainer.process.wait(10)
        assert sync.add_engine(late.url, api_key=API_KEY) == version
        assert ask_all(late) == ask_all(server) == answers_of(1)
        assert digests_of(late) == digests_of(server)
        (*_, last) = CoordinatorClient(RayChannel.find(trainer.group)).history()
        assert (last["version"], last["source"]) == (version, server.url)


def digests_of(server: Server) -> dict[str, tuple[int, int, bool]]:
    """Of every tensor, summed over the ranks, whatever its layout."""
    ranks = server.post("/rdt/digest").json()["ranks"]
    found = [
        RegionDigest(**{**digest, "start": tuple(digest["start"]), "stop": tuple(digest["stop"])})
        for rank in ranks
        for digest in rank["digests"]
    ]
    assert found
    return add_digests(found)
