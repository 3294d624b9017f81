"""What the gateway promises its clients, over real HTTP; bytes move inside this process."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from rdt_core.client import CoordinatorClient
from rdt_core.errors import ClosedError, ReleasedError
from rdt_core.gateway.__main__ import main, parse_arguments, settings_of
from rdt_core.gateway.app import make_app
from rdt_core.gateway.pair import PairSpec
from rdt_core.gateway.pairs import Pairs
from rdt_core.gateway.settings import GatewaySettings
from rdt_core.sync import WeightSync
from rdt_core.trainer_routes import TrainerWorker, make_router
from tests.areal_client import ArealClient, NewerArealClient
from tests.contract.notes import Notes
from tests.contract.world import expected_fingerprint
from tests.integration.test_sync import fingerprint
from tests.integration.toy_trainer import ToyTrainer
from tests.local_group import LocalGroup, local_group, serve, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "a key of this test"
SETTINGS = GatewaySettings(
    api_key=KEY, transport="memory", init_timeout_s=60.0, update_timeout_s=60.0, max_body_bytes=100_000
)


@dataclass
class Gateway:
    url: str
    notes: Notes
    http: httpx.Client

    def post(self, route: str, **body: Any) -> httpx.Response:
        return self.http.post(route, json=body)

    def update(self, pair: str, version: int, **body: Any) -> httpx.Response:
        return self.post("/update_weights", pair_name=pair, version=version, **body)


@contextlib.contextmanager
def gateway_of(group: LocalGroup, settings: GatewaySettings = SETTINGS) -> Iterator[Gateway]:
    """A gateway whose drivers reach a group of this process."""
    notes = Notes()

    def connect(name: str, engines: list[str], **options: Any) -> WeightSync:
        return WeightSync.connect(name, engines, channel=group.channel, **options)

    with (
        serve(make_app(settings, observers=[notes], connect=connect)) as url,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120.0) as http,
    ):
        yield Gateway(url, notes, http)


@contextlib.contextmanager
def trainer_apps(group: LocalGroup, *api_keys: str) -> Iterator[list[str]]:
    """Every trainer rank's own app with our routes; the ranks attach when a gateway says so."""
    with contextlib.ExitStack() as stack:
        urls = []
        for trainer in group.trainers:
            worker = TrainerWorker(group.name, trainer.local, channel=group.channel)
            stack.callback(worker.close)
            app = FastAPI()
            app.include_router(make_router(worker, api_keys))
            urls.append(stack.enter_context(serve(app)))
        yield urls


@pytest.fixture(scope="module")
def group() -> Iterator[LocalGroup]:
    with local_group() as made:
        yield made


@pytest.fixture(scope="module")
def engine(group: LocalGroup) -> Iterator[str]:
    with group.serve_engine() as url:
        yield url


@pytest.fixture(scope="module")
def gateway(group: LocalGroup) -> Iterator[Gateway]:
    with gateway_of(group) as made:
        yield made


@pytest.fixture
def pair(gateway: Gateway, engine: str, group: LocalGroup) -> Iterator[str]:
    """A pair that is connected when the test begins."""
    name = "policy-pair"
    answer = gateway.post("/connect", pair_name=name, group=group.name, inference_worker_urls=[engine])
    assert answer.status_code == 200, answer.text
    yield name
    gateway.post("/disconnect", pair_name=name)


@pytest.mark.parametrize("client_kind", [ArealClient, NewerArealClient])
def test_an_areal_client_drives_it_unchanged(client_kind: type[ArealClient]) -> None:
    group = LocalGroup()
    with trainer_apps(group) as trainers, group.serve_engine() as engine, gateway_of(group) as gateway:
        client = client_kind(gateway.url, KEY)
        assert client.is_healthy()
        client.connect("actor-rollout", trainers, [engine])
        for _ in range(2):
            version = group.write()
            update = client.update_weights(version)
            assert (update.status, update.version, update.error) == ("ok", version, None)
            assert update.duration_ms > 0
            assert fingerprint(engine) == expected_fingerprint(version)
        client.disconnect()
        client.close()
        assert httpx.get(f"{engine}/rdt/status").json()["ranks"][0]["group"] is None
        assert fingerprint(engine) == expected_fingerprint(group.version)
        status = httpx.post(f"{trainers[0]}/rdt/update_weights", json={"pair_name": "x", "version": 9})
        assert status.status_code == 409, "the trainers' workers were torn down"


def test_an_update_answers_phases_in_milliseconds(gateway: Gateway, pair: str, group: LocalGroup) -> None:
    body = gateway.update(pair, group.write_and_publish()).json()
    assert set(body["phases"]) == {"publish_ms", "publish_wait_ms", "prepare_ms", "commit_ms", "stall_ms"}
    assert 0 < body["phases"]["prepare_ms"] <= body["duration_ms"]
    assert body["error"] is None


def test_a_version_that_was_synced_is_answered_again_and_not_run_again(
    gateway: Gateway, pair: str, group: LocalGroup
) -> None:
    version = group.write_and_publish()
    first = gateway.update(pair, version)
    runs = gateway.notes.count("synced")
    again = gateway.update(pair, version)
    assert again.status_code == 200
    assert again.json() == first.json()
    assert gateway.notes.count("synced") == runs


def test_a_version_of_trainers_that_were_replaced_is_not_taken_for_the_one_that_was_synced(
    gateway: Gateway, pair: str, group: LocalGroup
) -> None:
    version = group.write_and_publish()
    assert gateway.update(pair, version).status_code == 200
    group.trainers[1].close()
    group.trainers[1] = ToyTrainer(1, 2)
    group.trainers[1].attach(group.name, group.channel)
    refused = gateway.update(pair, version)
    assert (refused.status_code, refused.json()["error_type"]) == (409, "StaleVersionError")
    assert gateway.update(pair, group.write_and_publish()).status_code == 200


def test_a_retry_joins_the_update_that_is_under_way_and_another_version_is_refused(
    gateway: Gateway, pair: str, group: LocalGroup
) -> None:
    version = group.write()
    runs = gateway.notes.count("synced")
    with ThreadPoolExecutor() as pool:
        tries = [pool.submit(gateway.update, pair, version) for _ in range(3)]
        wait_for(lambda: gateway.http.get("/pairs").json()["pairs"][0]["running_version"] == version)
        other = gateway.update(pair, version + 1)
        for trainer in group.trainers:
            trainer.publish(version)
        answers = [attempt.result(60) for attempt in tries]
    assert other.status_code == 409
    assert other.json()["error_type"] == "PairBusyError"
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.text for answer in answers}) == 1
    assert gateway.notes.count("synced") == runs + 1


def test_a_client_that_goes_away_does_not_end_its_update(
    gateway: Gateway, pair: str, group: LocalGroup
) -> None:
    version = group.write()
    with pytest.raises(httpx.ReadTimeout):
        gateway.http.post("/update_weights", json={"pair_name": pair, "version": version}, timeout=0.3)
    runs = gateway.notes.count("synced")
    for trainer in group.trainers:
        trainer.publish(version)
    wait_for(lambda: gateway.notes.count("synced") == runs + 1)
    assert gateway.update(pair, version).json()["status"] == "ok"


def test_a_failed_update_is_an_http_error_with_the_same_fields_and_can_be_retried(
    gateway: Gateway, pair: str, group: LocalGroup, engine: str
) -> None:
    before = fingerprint(engine)
    version = group.write()
    failed = gateway.update(pair, version, timeout_s=0.2)
    assert failed.status_code == 409
    body = failed.json()
    assert (body["status"], body["version"], body["error_type"]) == ("error", version, "NotPublishedError")
    assert "have not published" in body["error"]
    assert body["duration_ms"] > 0
    assert body["inference_weights_may_be_mutated"] is False
    assert fingerprint(engine) == before
    assert "have not published" in gateway.http.get("/pairs").json()["pairs"][0]["last_error"]
    for trainer in group.trainers:
        trainer.publish(version)
    assert gateway.update(pair, version).status_code == 200
    assert fingerprint(engine) == expected_fingerprint(version)


def test_a_read_that_fails_is_a_bad_gateway_and_the_engine_serves_on(
    gateway: Gateway, pair: str, group: LocalGroup, engine: str
) -> None:
    before = fingerprint(engine)
    group.trainers[0].publisher._exports.close()
    failed = gateway.update(pair, group.write_and_publish())
    assert failed.status_code == 502
    assert failed.json()["inference_weights_may_be_mutated"] is False
    assert fingerprint(engine) == before


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_is_none_is_a_bad_request(gateway: Gateway, pair: str, version: int) -> None:
    assert gateway.update(pair, version).status_code == 400


def test_an_update_can_change_the_mode(gateway: Gateway, pair: str, group: LocalGroup, engine: str) -> None:
    version = group.write_and_publish()
    assert gateway.update(pair, version, mode="inplace").status_code == 200
    assert httpx.get(f"{engine}/rdt/status").json()["ranks"][0]["mode"] == "inplace"
    assert fingerprint(engine) == expected_fingerprint(version)
    assert gateway.update(pair, version + 1, mode="awex").status_code == 422


def test_an_older_version_is_a_conflict(gateway: Gateway, pair: str, group: LocalGroup) -> None:
    version = group.write_and_publish()
    assert gateway.update(pair, version).status_code == 200
    older = gateway.update(pair, version - 1)
    assert older.status_code == 409
    assert older.json()["error_type"] == "StaleVersionError"


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"mode": "awex"}, 400, "awex"),
        ({"use_lora": True}, 400, "use_lora"),
        ({"colocate": True}, 400, "colocate"),
        ({"group": ""}, 400, "train_worker_urls"),
        ({"inference_worker_urls": []}, 422, "inference_worker_urls"),
        ({"inference_worker_urls": ["file:///etc/passwd"]}, 422, "inference_worker_urls"),
        ({"inference_worker_urls": ["http://127.0.0.1:9"]}, 502, "127.0.0.1:9"),
        ({"train_worker_urls": ["http://127.0.0.1:9"]}, 502, "trainer worker http://127.0.0.1:9"),
        ({"pair_name": "a/b"}, 422, "pair_name"),
    ],
)
def test_a_connect_that_cannot_be_is_refused_by_name(
    gateway: Gateway, engine: str, fields: dict[str, Any], status: int, named: str
) -> None:
    good = {"pair_name": "refused", "group": "policy", "inference_worker_urls": [engine]}
    answer = gateway.post("/connect", **{**good, **fields})
    assert answer.status_code == status, answer.text
    assert named in answer.json()["error"]
    assert gateway.http.get("/pairs").json() == {"pairs": []}


def test_a_repeated_connect_is_the_same_pair_and_other_workers_are_a_conflict(
    gateway: Gateway, pair: str, engine: str, group: LocalGroup
) -> None:
    same = {"pair_name": pair, "group": group.name, "inference_worker_urls": [engine]}
    connects = gateway.notes.count("connected")
    assert gateway.post("/connect", **same).status_code == 200
    assert gateway.notes.count("connected") == connects
    other = gateway.post("/connect", **{**same, "inference_worker_urls": ["http://127.0.0.1:9"]})
    assert other.status_code == 409
    assert other.json()["error_type"] == "PairExistsError"


def test_disconnect_can_be_repeated_and_an_unknown_pair_is_not_found(gateway: Gateway, pair: str) -> None:
    for _ in range(2):
        assert gateway.post("/disconnect", pair_name=pair).json() == {"status": "ok", "pair_name": pair}
    assert gateway.post("/disconnect", pair_name="never seen").status_code == 422
    assert gateway.post("/disconnect", pair_name="never-seen").status_code == 404
    missing = gateway.update("never-seen", 1)
    assert (missing.status_code, missing.json()["status"]) == (404, "error")


def test_pairs_tell_group_state_and_version(
    gateway: Gateway, pair: str, group: LocalGroup, engine: str
) -> None:
    version = group.write_and_publish()
    gateway.update(pair, version)
    (row,) = gateway.http.get("/pairs").json()["pairs"]
    assert row == {
        "pair_name": pair,
        "group": group.name,
        "state": "connected",
        "version": version,
        "running_version": None,
        "engines": [engine],
        "trainer_workers": [],
        "last_error": None,
    }


def test_metadata_is_kept_by_pair_and_key_and_forgotten_with_the_pair(gateway: Gateway, pair: str) -> None:
    http, value = gateway.http, {"params": [1, 2.5, None, "x"]}
    assert http.get(f"/weight_meta/{pair}/layout").status_code == 404
    assert http.put(f"/weight_meta/{pair}/layout", json={"value": value}).json() == {"status": "ok"}
    assert http.get(f"/weight_meta/{pair}/layout").json() == {"value": value}
    for member in ("a", "b", "a"):
        http.put(f"/weight_meta/{pair}/set/ready", json={"value": member}).raise_for_status()
    assert http.get(f"/weight_meta/{pair}/set/ready/size").json() == {"size": 2}
    assert http.delete(f"/weight_meta/{pair}/layout").json() == {"status": "ok", "deleted": True}
    assert http.delete(f"/weight_meta/{pair}/layout").json() == {"status": "ok", "deleted": False}
    gateway.post("/disconnect", pair_name=pair)
    assert http.get(f"/weight_meta/{pair}/set/ready/size").json() == {"size": 0}


def test_every_route_but_health_wants_the_key() -> None:
    app = make_app(SETTINGS)
    routes = [route for route in walk(app) if route.path != "/health"]
    assert {"/connect", "/update_weights", "/disconnect", "/pairs", "/openapi.json"} <= {
        r.path for r in routes
    }
    with serve(app) as url, httpx.Client(base_url=url) as http:
        for route in routes:
            for method in route.methods:
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
                    answer = http.request(method, route.path, headers=headers)
                    assert answer.status_code == 401, (method, route.path)
                    scheme = "Basic" if route.path == "/" else "Bearer"
                    assert answer.headers["www-authenticate"].startswith(scheme)
        assert http.get("/health").json() == {"status": "healthy"}
        for unguarded in ("/docs", "/redoc"):
            assert http.get(unguarded).status_code == 404


def walk(app: FastAPI) -> list[APIRoute]:
    """Every route that the app answers; one of another kind would pass by the guard unseen."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) == len(app.routes)
    return routes


@pytest.mark.parametrize("has_length", [True, False], ids=["declared", "chunked"])
def test_a_body_that_is_too_large_is_refused(gateway: Gateway, has_length: bool) -> None:
    content = b'{"value": "' + b"x" * SETTINGS.max_body_bytes + b'"}'
    body: Any = content if has_length else iter([content[:1000], content[1000:]])
    answer = gateway.http.put("/weight_meta/p/k", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert str(SETTINGS.max_body_bytes) in answer.json()["error"]


def test_a_malformed_update_is_refused_with_the_fields_a_client_reads(gateway: Gateway) -> None:
    answer = gateway.http.post("/update_weights", json={"pair_name": "p", "version": "many"})
    assert answer.status_code == 422
    assert answer.json()["status"] == "error"
    assert "version" in answer.json()["error"]


def test_shutting_down_disconnects_every_pair(group: LocalGroup) -> None:
    with group.serve_engine() as engine:
        with gateway_of(group) as gateway:
            body = {"pair_name": "p", "group": group.name, "inference_worker_urls": [engine]}
            assert gateway.post("/connect", **body).status_code == 200
            assert httpx.get(f"{engine}/rdt/status").json()["ranks"][0]["group"] == group.name
        assert httpx.get(f"{engine}/rdt/status").json()["ranks"][0]["group"] is None
        assert gateway.notes.count("closed") == 1


def test_trainers_and_engines_may_have_keys_of_their_own() -> None:
    group = LocalGroup()
    settings = replace(SETTINGS, engine_api_key="of engines", trainer_api_key="of trainers")
    with (
        trainer_apps(group, "of trainers") as trainers,
        group.serve_engine("of engines") as engine,
        gateway_of(group, settings) as gateway,
    ):
        assert httpx.get(f"{trainers[0]}/rdt/report_parallelism").status_code == 401
        body = {"pair_name": "p", "train_worker_urls": trainers, "inference_worker_urls": [engine]}
        answer = gateway.post("/connect", **body)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            "pair_name": "p",
            "group": group.name,
            "num_engines": 1,
            "num_engine_ranks": 1,
        }


def test_a_trainer_that_is_named_twice_or_left_out_is_refused_before_anything_is_attached() -> None:
    group = LocalGroup()
    with trainer_apps(group) as trainers, group.serve_engine() as engine, gateway_of(group) as gateway:
        for workers in ([trainers[0]], [trainers[0], trainers[0]]):
            body = {"pair_name": "p", "train_worker_urls": workers, "inference_worker_urls": [engine]}
            answer = gateway.post("/connect", **body)
            assert answer.status_code == 502
            assert "not each rank once" in answer.json()["error"]
        assert fingerprint(engine) is not None
    group.channel.end()


def test_a_trainer_tells_its_regions_without_an_address(group: LocalGroup) -> None:
    with trainer_apps(group) as urls:
        answer = httpx.post(f"{urls[1]}/rdt/report_weight_meta", json={}).json()
        assert answer["rank"] == 1
        first = answer["meta"][0]
        assert first == {
            "name": "embed.weight",
            "dtype": "float32",
            "shape": [100, 64],
            "start": [50, 0],
            "stop": [100, 64],
        }
        for body in (b"[]", b"x" * 100_000, b"\x80\x04."):
            assert httpx.post(f"{urls[0]}/rdt/teardown", content=body).status_code in (400, 413)
        assert httpx.post(f"{urls[0]}/rdt/teardown", json={"pair_name": 3}).status_code == 400


def test_threads_of_disconnected_pairs_end(gateway: Gateway, pair: str) -> None:
    gateway.post("/disconnect", pair_name=pair)
    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith(f"rdt-pair-{pair}")])


def test_the_command_refuses_to_listen_for_others_with_a_key_that_everybody_knows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RDT_GATEWAY_API_KEY", raising=False)
    flags = ["--host", "0.0.0.0", "--port", "7080"]  # noqa: S104  refused
    for key in ([], ["--admin-api-key", "areal-admin-key"]):
        assert main([*flags, *key, "--init-timeout", "300", "--update-timeout", "120"]) == 2
        assert "0.0.0.0" in capsys.readouterr().err  # noqa: S104  the message names it


def test_the_command_takes_its_keys_from_the_environment_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RDT_GATEWAY_API_KEY", "from the environment")
    monkeypatch.setenv("RDT_ENGINE_API_KEY", "of the engines")
    settings = settings_of(parse_arguments(["--group", "policy"]))
    assert (settings.api_key, settings.engine_api_key) == ("from the environment", "of the engines")
    file = tmp_path / "key"
    file.write_text("from a file\n")
    assert settings_of(parse_arguments(["--api-key-file", str(file)])).api_key == "from a file"


def test_a_pair_that_is_being_disconnected_can_be_neither_connected_nor_updated(
    group: LocalGroup, engine: str
) -> None:
    def connect(name: str, engines: list[str], **options: Any) -> WeightSync:
        return WeightSync.connect(name, engines, channel=group.channel, **options)

    pairs = Pairs(SETTINGS, connect=connect)
    spec = PairSpec(name="p", group=group.name, engines=(engine,))
    pair = pairs.connect(spec)
    pair.connected.result(60)
    pair.close().result(60)
    with pytest.raises(ClosedError, match="disconnected"):
        pairs.connect(spec)
    with pytest.raises(ClosedError):
        pair.update(1)
    pairs.close(60)


def test_a_trainer_worker_keeps_readers_out_while_it_writes() -> None:
    group = LocalGroup(world_size=1)
    worker = TrainerWorker(group.name, group.trainers[0].local, channel=group.channel)
    with worker.writing():
        assert worker.init("p") == {"status": "ok", "version": 0}
    worker.publish("p", 1)
    client = CoordinatorClient(group.channel)
    client.wait_published(1, 30.0)
    with worker.writing(), pytest.raises(ReleasedError):
        client.wait_published(1, 30.0)
    worker.publish("p", 2)
    client.wait_published(2, 30.0)
    worker.close()
    worker.close()
