from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from rdt_core.coordinator import Coordinator
from rdt_core.errors import CoordinatorLostError, DeadlineError, RdtError, SupersededError
from rdt_core.line import Line, LineAddress, LineServer, pack, unpack
from rdt_core.words import Outcome, TrainerTask

if TYPE_CHECKING:
    from collections.abc import Iterator


class Host:
    """A coordinator with a line, on an event loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.coordinator = Coordinator("policy")
        self.server = LineServer(self.coordinator)
        self.address = self.run(self.server.listen("127.0.0.1"))
        self.run(self.coordinator.attach(0, 1, "a", b"manifest"))

    def run(self, coroutine: object) -> LineAddress:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)  # type: ignore[arg-type]  # whatever it returns

    def stop(self) -> None:
        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if self.loop.is_running():
            self.run(self.server.close())
            self.run(cancel_all())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(30)
            self.loop.close()


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.stop()


@pytest.fixture
def line(host: Host) -> Iterator[Line]:
    made = Line(host.address, "policy")
    yield made
    made.close()


def call(line: Line, method: str, *args: object, timeout_s: float = 30.0) -> object:
    return line.start(method, *args)(timeout_s)


def test_a_call_reaches_the_coordinator_and_its_errors_come_back_with_their_type(line: Line) -> None:
    call(line, "publish", 0, "a", 1)
    call(line, "check_version", 1)
    call(line, "publish", 0, "a", 2)
    with pytest.raises(SupersededError) as caught:
        call(line, "check_version", 1)
    assert (caught.value.version, caught.value.current) == (1, 2)


def test_outcomes_cross_with_their_keys_values_and_errors(line: Line) -> None:
    call(line, "report_prepared", "http://a", 0, "1:x", Outcome({"prepare_s": 0.5}))
    call(line, "report_prepared", "http://a", 1, "1:x", Outcome(error=SupersededError(1, 2)))
    call(line, "publish", 0, "a", 1)
    members, life = [("http://a", 0), ("http://a", 1)], call(line, "check_version", 1)
    outcomes = call(line, "wait_prepared", "1:x", members, life, 30.0)
    assert isinstance(outcomes, dict)
    assert outcomes["http://a", 0] == Outcome({"prepare_s": 0.5})
    assert isinstance(outcomes["http://a", 1].error, SupersededError)


def test_calls_from_one_line_wait_beside_each_other(line: Line) -> None:
    waiting = line.start("wait_published", 1, 30.0)
    call(line, "publish", 0, "a", 1)
    waiting(30.0)


def test_a_call_that_outlasts_its_deadline_is_named_and_the_line_goes_on(line: Line) -> None:
    with pytest.raises(DeadlineError, match="wait_published"):
        call(line, "wait_published", 1, 30.0, timeout_s=0.05)
    call(line, "publish", 0, "a", 1)


def test_only_the_methods_of_a_sync_can_be_called(line: Line) -> None:
    for method in ("detach", "attach", "__init__", "status"):
        with pytest.raises(RdtError, match="no method"):
            call(line, method)
    with pytest.raises(RdtError, match="cannot take this call"):
        call(line, "publish", "too few")


def test_who_does_not_know_the_secret_gets_no_answer(host: Host) -> None:
    wrong = Line(dataclasses.replace(host.address, secret=bytes(32)), "policy")
    with pytest.raises(CoordinatorLostError):
        call(wrong, "publish", 0, "a", 1)
    wrong.close()
    assert "secret" not in repr(host.address)


def test_what_is_no_call_ends_the_connection_and_nothing_else(host: Host, line: Line) -> None:
    with socket.create_connection((host.address.host, host.address.port), timeout=30) as stranger:
        stranger.sendall(host.address.secret + b"\xff\xff\xff\xff")
        assert stranger.recv(1) == b""
    with socket.create_connection((host.address.host, host.address.port), timeout=30) as stranger:
        stranger.sendall(host.address.secret + b"\x00\x00\x00\x01\xc1")
        assert stranger.recv(4) != b""
    call(line, "publish", 0, "a", 1)


def test_a_coordinator_that_ended_is_lost(host: Host, line: Line) -> None:
    call(line, "publish", 0, "a", 1)
    host.stop()
    with pytest.raises(CoordinatorLostError, match="policy"):
        call(line, "publish", 0, "a", 2)


def test_an_address_nobody_answers_at_is_an_os_error(host: Host) -> None:
    host.stop()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="refused"):
            Line(dataclasses.replace(host.address, port=free.getsockname()[1]), "policy")


@pytest.mark.parametrize(
    "value",
    [
        *(None, 1, 2.5, "a", b"b", [1, (2, "c")], {("a", 0): Outcome(1)}, {1: {"x": (1, (2, ()))}}),
        [TrainerTask(2**60, "export", {"ranges": [("w", 0, 8)], "arena": ()}, "00-a-b-01")],
    ],
)
def test_plain_values_come_back_as_they_were(value: object) -> None:
    assert unpack(pack(value)) == value


def test_other_values_are_refused() -> None:
    with pytest.raises(TypeError):
        pack(object())
