"""The routes that the flag opens: which, for whom, and what a commit does around the workers' own part.

The application is the one that vLLM builds; behind it stands a client that records what it is asked, where a
real engine would be. ``test_server.py`` asks a real one.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core.error_wire import to_wire
from rdt_core.errors import NotPreparedError
from tests.e2e.processes import API_KEY

if TYPE_CHECKING:
    from starlette.testclient import TestClient

# vLLM and what it imports warn of this and that while they are imported.
pytestmark = pytest.mark.filterwarnings("default")

BEARER = {"Authorization": f"Bearer {API_KEY}"}
CONTROL = ["/rdt/connect", "/rdt/prepare", "/rdt/commit", "/rdt/abort", "/rdt/disconnect", "/rdt/digest"]
UPDATES = [
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/update_weight_version",
    "/pause",
    "/resume",
]
READS = ["/rdt/status", "/is_paused", "/weight_info"]
OTHER_DEVELOPMENT = ["/collective_rpc", "/reset_prefix_cache", "/sleep", "/wake_up"]


def holds(version: int, session: str = "first") -> dict[str, Any]:
    """What a worker that is whole answers to ``status``."""
    return {"ok": True, "result": {"version": version, "session": session, "is_torn": False}}


class RecordingClient:
    """Stands where ``AsyncLLM`` would: two workers whose answers a test sets, and the order of all calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.error: Exception | None = None
        self.is_cache_free = True
        self.paused = False
        self.weight_version = "default"
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size_across_dp=2))
        self.model_config = SimpleNamespace(is_multimodal_model=False)

    async def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        self.calls.append(f"{name}:{args[0]}")
        if self.error is not None:
            raise self.error
        return self.answers.get(args[0], [holds(0)] * 2)

    async def is_paused(self) -> bool:
        return self.paused

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause:{mode}:{clear_cache}")
        self.paused = True

    async def resume_generation(self) -> None:
        self.calls.append("resume")
        self.paused = False

    async def reset_prefix_cache(self, *, reset_running_requests: bool, reset_connector: bool) -> bool:
        self.calls.append(f"reset:{reset_running_requests}:{reset_connector}")
        return self.is_cache_free

    async def update_weight_version(self, version: str) -> None:
        self.calls.append("label")
        self.weight_version = version

    async def get_weight_version(self) -> str:
        return self.weight_version


def connect_app(arguments: list[str], client: RecordingClient) -> TestClient:
    """vLLM's own application for the given command line, as ``vllm serve`` builds it."""
    from starlette.testclient import TestClient
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["m", *arguments])
    app = build_app(args, ("generate",))
    app.state.engine_client = client
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client() -> RecordingClient:
    return RecordingClient()


@pytest.fixture
def flagged(client: RecordingClient) -> TestClient:
    return connect_app(["--weight-sync", "rdt", "--api-key", API_KEY], client)


def ask(app: TestClient, path: str, **more: Any) -> Any:
    return app.get(path, **more) if path in READS else app.post(path, **more)


@pytest.mark.parametrize("path", CONTROL + UPDATES + READS)
def test_every_weight_sync_route_asks_for_the_servers_key(flagged: TestClient, path: str) -> None:
    assert ask(flagged, path).status_code == 401
    assert ask(flagged, path, headers={"Authorization": "Bearer another"}).status_code == 401
    assert ask(flagged, path, headers=BEARER).status_code not in (401, 404)


def test_a_key_from_the_environment_guards_as_well(
    client: RecordingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", API_KEY)
    app = connect_app(["--weight-sync", "rdt"], client)
    assert app.get("/rdt/status").status_code == 401
    assert app.get("/rdt/status", headers=BEARER).status_code == 200


def test_a_server_without_a_key_is_open(client: RecordingClient) -> None:
    assert connect_app(["--weight-sync", "rdt"], client).get("/rdt/status").json()["world_size"] == 2


@pytest.mark.parametrize("path", OTHER_DEVELOPMENT)
def test_the_flag_opens_no_other_development_route(flagged: TestClient, path: str) -> None:
    assert flagged.post(path, headers=BEARER).status_code == 404


def test_in_development_mode_the_same_routes_stay_guarded(
    client: RecordingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    app = connect_app(["--weight-sync", "rdt", "--api-key", API_KEY], client)
    assert app.post("/pause").status_code == 401
    assert client.calls == []
    assert app.post("/pause?mode=keep", headers=BEARER).status_code == 200
    assert client.calls == ["pause:keep:True"]


@pytest.mark.parametrize("path", ["/rdt/status", "/rdt/commit", "/pause", "/weight_info"])
def test_without_the_flag_there_is_no_such_route(client: RecordingClient, path: str) -> None:
    assert ask(connect_app([], client), path).status_code == 404


def test_a_commit_holds_generation_drops_the_cache_and_labels_what_follows(
    flagged: TestClient, client: RecordingClient
) -> None:
    client.answers["commit"] = [{"ok": True, "result": {"rank": rank}} for rank in range(2)]
    answer = flagged.post("/rdt/commit", json={"version": 7}, headers=BEARER)
    assert answer.json()["ranks"] == [{"rank": 0}, {"rank": 1}]
    assert answer.json()["stall_s"] > 0
    assert client.calls == ["pause:keep:False", "reset:True:True", "rdt_call:commit", "label", "resume"]
    assert flagged.get("/weight_info", headers=BEARER).json() == {"weight_version": "7"}


def test_a_commit_may_keep_the_cache(flagged: TestClient, client: RecordingClient) -> None:
    client.answers["commit"] = [{"ok": True, "result": {}}] * 2
    flagged.post("/rdt/commit", json={"version": 7, "kv_cache": "keep"}, headers=BEARER)
    assert client.calls == ["pause:keep:False", "rdt_call:commit", "label", "resume"]


def test_a_commit_leaves_a_server_that_someone_else_paused_paused(
    flagged: TestClient, client: RecordingClient
) -> None:
    client.paused = True
    client.answers["commit"] = [{"ok": True, "result": {}}] * 2
    assert flagged.post("/rdt/commit", json={"version": 7}, headers=BEARER).is_success
    assert "resume" not in client.calls


def test_a_commit_that_no_worker_began_is_reported_unlabelled_and_generation_goes_on(
    flagged: TestClient, client: RecordingClient
) -> None:
    client.answers["commit"] = [{"ok": False, "error": to_wire(NotPreparedError(7, None))}] * 2
    answer = flagged.post("/rdt/commit", json={"version": 7}, headers=BEARER)
    assert answer.status_code == 409
    assert answer.json()["error"]["type"] == "NotPreparedError"
    assert "label" not in client.calls
    assert client.calls[-1] == "resume"


@pytest.mark.parametrize("missed", [holds(6), holds(7, "the session before")])
def test_a_commit_that_some_workers_missed_holds_generation_until_one_succeeds_on_all(
    flagged: TestClient, client: RecordingClient, missed: dict[str, Any]
) -> None:
    done = {"ok": True, "result": {}}
    client.answers["commit"] = [done, {"ok": False, "error": to_wire(NotPreparedError(7, None))}]
    client.answers["status"] = [holds(7), missed]
    assert flagged.post("/rdt/commit", json={"version": 7}, headers=BEARER).status_code == 409
    assert client.paused
    assert client.weight_version == "default"
    assert client.calls[-1] == "pause:abort:False"
    refused = flagged.post("/v1/completions", json={"prompt": "x"}, headers=BEARER)
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "EngineTornError"
    assert flagged.get("/rdt/status", headers=BEARER).is_success

    client.answers["commit"] = [done, done]
    assert flagged.post("/rdt/commit", json={"version": 8}, headers=BEARER).is_success
    assert not client.paused
    assert client.weight_version == "8"
    assert flagged.post("/v1/completions", json={"prompt": "x"}, headers=BEARER).status_code != 503


def test_a_cache_that_cannot_be_dropped_fails_the_commit_before_any_worker_begins(
    flagged: TestClient, client: RecordingClient
) -> None:
    client.is_cache_free = False
    answer = flagged.post("/rdt/commit", json={"version": 7}, headers=BEARER)
    assert answer.json()["error"]["type"] == "UpdateFailedError"
    assert "rdt_call:commit" not in client.calls
    assert not client.paused


@pytest.mark.parametrize("version", [None, "7", 0, True])
def test_a_bad_version_is_refused_without_holding_generation(
    flagged: TestClient, client: RecordingClient, version: object
) -> None:
    assert flagged.post("/rdt/commit", json={"version": version}, headers=BEARER).status_code == 400
    assert client.calls == []


def test_vllms_own_update_routes_report_a_workers_error_by_its_type(
    flagged: TestClient, client: RecordingClient
) -> None:
    failed = {"ok": False, "error": to_wire(NotPreparedError(7, None))}
    client.answers["finish_weight_update"] = [{"ok": True, "result": None}, failed]
    answer = flagged.post("/finish_weight_update", json={"weight_version": "7"}, headers=BEARER)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "NotPreparedError"
    assert client.weight_version == "default"


@pytest.mark.parametrize("route", ["connect", "prepare", "commit"])
def test_a_worker_that_has_died_is_reported_by_the_type_of_an_engine_that_is_gone(
    flagged: TestClient, client: RecordingClient, route: str
) -> None:
    client.error = Exception("Call to collective_rpc method failed: cancelled")
    answer = flagged.post(f"/rdt/{route}", json={"version": 1}, headers=BEARER)
    assert answer.json()["error"]["type"] == "EngineUnreachableError"
    assert "cancelled" in answer.text


def test_commits_of_one_server_take_turns(client: RecordingClient) -> None:
    from rdt_vllm.routes import VllmBackend

    client.answers["commit"] = [{"ok": True, "result": {}}] * 2

    async def commit_twice() -> None:
        backend = VllmBackend(client)
        payloads = [{"version": version, "kv_cache": "keep"} for version in (1, 2)]
        await asyncio.gather(*map(backend.commit, payloads))

    asyncio.run(commit_twice())
    assert client.calls == ["pause:keep:False", "rdt_call:commit", "label", "resume"] * 2


def test_a_commit_does_not_wait_for_a_core_that_has_ended(client: RecordingClient) -> None:
    from rdt_vllm import compat

    async def never_answer(*_: Any) -> None:
        await asyncio.Event().wait()

    async def commit() -> None:
        vars(client).update(engine_core=SimpleNamespace(call_utility_async=never_answer), is_stopped=True)
        await compat.flip_in_core(client, {"version": 1}, was_torn=False)

    with pytest.raises(compat.dead_engine_error()):
        asyncio.run(asyncio.wait_for(commit(), 30))
