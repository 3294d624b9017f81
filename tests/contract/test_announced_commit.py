"""A commit is announced while engines read: it saves time, and commits nothing before all have read."""

from __future__ import annotations

import logging
import select
import threading
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core import engine_routes, tracing
from rdt_core.client import CoordinatorClient
from rdt_core.engine_http import EngineHttp
from rdt_core.errors import NotPreparedError, UpdateFailedError
from rdt_core.sync import WeightSync
from tests.contract.local_engine import LocalEngine
from tests.contract.world import expected_fingerprint
from tests.integration.test_sync import fingerprint
from tests.local_group import local_group, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from http.client import HTTPConnection

    from tests.local_group import LocalGroup

TIMEOUT_S = 60.0


class Announced(EngineHttp):
    """An engine over HTTP that counts which of its calls had been announced."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.told: list[str] = []
        self.announced = 0

    def announce(self, method: str, payload: Mapping[str, Any]) -> None:
        super().announce(method, payload)
        self.announced += 1

    def _take_announced(self, method: str, body: bytes | None) -> HTTPConnection | None:
        connection = super()._take_announced(method, body)
        if connection is not None:
            self.told.append(method)
        return connection


class DiesReading(LocalEngine):
    """Takes a request to read and is gone then, once it has been told to."""

    is_doomed = False

    def call(self, method: str, payload: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        if self.is_doomed and method == "prepare":
            self.is_dead = True
            return {}
        return super().call(method, payload, timeout_s=timeout_s)


@pytest.fixture
def group() -> Iterator[LocalGroup]:
    with local_group() as made:
        yield made


@pytest.fixture
def engine(group: LocalGroup) -> Iterator[Announced]:
    """Behind a real server."""
    with group.serve_engine() as url:
        yield Announced(url)


def drive(group: LocalGroup, *engines: EngineHttp | LocalEngine) -> WeightSync:
    asked = {"group": group.name, "transport": "memory", "timeout_s": TIMEOUT_S}
    sync = WeightSync(CoordinatorClient(group.channel), engines, asked)
    sync.join_all()
    return sync


def test_every_commit_is_announced(group: LocalGroup, engine: Announced) -> None:
    with drive(group, engine) as sync:
        for number in (1, 2):
            version = group.write_and_publish()
            sync.update(version, timeout_s=TIMEOUT_S)
            assert fingerprint(engine.url) == expected_fingerprint(version)
            assert engine.told == ["commit"] * number


def test_a_commit_that_is_traced_is_announced_too(
    group: LocalGroup, engine: Announced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans belong to the thread that drives, where a request is longer by the name of one."""
    main = threading.main_thread()
    span = f"00-{1:032x}-{1:016x}-01"
    monkeypatch.setattr(tracing, "traceparent", lambda: span if threading.current_thread() is main else "")
    with drive(group, engine) as sync:
        sync.update(group.write_and_publish(), timeout_s=TIMEOUT_S)
        assert engine.told == ["commit"]


def test_an_engine_that_was_told_of_a_commit_which_does_not_come_keeps_its_version(
    group: LocalGroup, engine: Announced, caplog: pytest.LogCaptureFixture
) -> None:
    other = DiesReading(group.channel, "other")
    with drive(group, engine, other) as sync:
        served = group.write_and_publish()
        sync.update(served, timeout_s=TIMEOUT_S)
        other.is_doomed = True
        with caplog.at_level(logging.ERROR), pytest.raises(UpdateFailedError, match="stopped listening"):
            sync.update(group.write_and_publish(), timeout_s=TIMEOUT_S)
        assert fingerprint(engine.url) == expected_fingerprint(served)
        assert engine.announced == 2
        assert not engine._announced
        other.is_doomed = other.is_dead = False
        version = group.write_and_publish()
        sync.update(version, timeout_s=TIMEOUT_S)
        assert fingerprint(engine.url) == other.fingerprint == expected_fingerprint(version)
    assert "ASGI" not in caplog.text
    other.stop()


def test_a_driver_that_is_interrupted_while_engines_read_leaves_none_waiting(
    group: LocalGroup, engine: Announced, monkeypatch: pytest.MonkeyPatch
) -> None:
    with drive(group, engine) as sync:

        def interrupt(*args: object, **kwargs: object) -> None:
            wait_for(lambda: "commit" in engine._announced)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(sync._client, "wait_prepared", interrupt)
            with pytest.raises(KeyboardInterrupt):
                sync.update(group.write_and_publish(), timeout_s=TIMEOUT_S)
        assert not engine._announced
        version = group.write_and_publish()
        sync.update(version, timeout_s=TIMEOUT_S)
        assert fingerprint(engine.url) == expected_fingerprint(version)


def test_an_engine_that_has_waited_for_long_enough_gets_the_commit_whole(
    group: LocalGroup, engine: Announced, monkeypatch: pytest.MonkeyPatch
) -> None:
    with drive(group, engine) as sync:
        with monkeypatch.context() as patch:
            patch.setattr(engine_routes, "BODY_TIMEOUT_S", 0.1)
            engine.announce("commit", {"version": 1})
            (announced, _) = engine._announced["commit"]
            assert select.select([announced.sock], [], [], TIMEOUT_S)[0]
        with pytest.raises(NotPreparedError):
            engine.call("commit", {"version": 1}, timeout_s=TIMEOUT_S)
        version = group.write_and_publish()
        sync.update(version, timeout_s=TIMEOUT_S)
        assert fingerprint(engine.url) == expected_fingerprint(version)
    assert engine.told == ["commit"]


def test_a_commit_that_is_taken_back_leaves_no_trace_in_the_engine(
    group: LocalGroup, engine: Announced, caplog: pytest.LogCaptureFixture
) -> None:
    with drive(group, engine) as sync, caplog.at_level(logging.ERROR):
        engine.announce("commit", {"version": 1})
        engine.retract("commit")
        version = group.write_and_publish()
        sync.update(version, timeout_s=TIMEOUT_S)
        assert fingerprint(engine.url) == expected_fingerprint(version)
    assert not caplog.records
