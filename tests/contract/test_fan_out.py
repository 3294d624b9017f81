"""Engines of one node that read together: every byte from the trainers once, whatever goes wrong."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from rdt_core import connection, link_plans, relay
from rdt_core.engine_routes import make_router
from rdt_core.engine_rpc import parse_connect
from rdt_core.errors import RdtError, UpdateFailedError, WireFormatError
from rdt_core.subscriber import WeightSubscriber
from tests.integration.columns import Columns, EngineRank
from tests.integration.toy_engine import ToyBackend
from tests.integration.toy_trainer import SHAPES, values_of
from tests.local_group import LocalGroup, local_group, serve, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_core.report import RankReport, SyncReport
    from rdt_core.sync import WeightSync

WAIT_S = 30.0


@pytest.fixture
def group() -> Iterator[LocalGroup]:
    with local_group() as made:
        yield made


@pytest.fixture
def engines(group: LocalGroup) -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(group.serve_engine()) for _ in range(3)]


@pytest.fixture
def sync(group: LocalGroup, engines: list[str]) -> Iterator[WeightSync]:
    with group.connect(*engines, fan_out="always") as made:
        yield made


def read_from_trainers(row: RankReport) -> int:
    return sum(link.nbytes for link in row.links)


def bytes_from_trainers(report: SyncReport) -> int:
    return sum(map(read_from_trainers, report.ranks))


def check(sync: WeightSync, report: SyncReport) -> None:
    """Every engine holds every byte, and each row's bytes add up."""
    assert sync.verify().bytes_equal
    for row in report.ranks:
        assert read_from_trainers(row) + row.neighbours_nbytes >= row.read_nbytes


def test_every_byte_comes_from_the_trainers_once(sync: WeightSync, group: LocalGroup) -> None:
    for verify in (None, "digest", None):
        report = sync.update(group.write_and_publish(), verify=verify)
        check(sync, report)
        whole = report.ranks[0].read_nbytes
        assert bytes_from_trainers(report) == whole
        assert all(0 < read_from_trainers(row) < whole / 2 for row in report.ranks)
        assert all(row.neighbours_nbytes > whole / 2 for row in report.ranks)
    assert sync.status()["engines"][0]["num_shares"] == 3
    assert sync.status()["lending"] == []


class ColumnBackend(ToyBackend):
    """An engine that needs the second half of every matrix's columns, as a tensor-parallel rank does."""

    def __init__(self, group: LocalGroup) -> None:
        self.columns = Columns(SHAPES, 1, 2, torch.float32)
        self.subscriber = WeightSubscriber(EngineRank(self.columns, 0, 1), channel=group.channel)
        self._model_thread = ThreadPoolExecutor(max_workers=1)

    def serve(self) -> contextlib.AbstractContextManager[str]:
        app = FastAPI()
        app.include_router(make_router(lambda request: self, ()))
        return serve(app)


@pytest.mark.parametrize("read_share", [1.0, 0.9])
def test_rows_are_shared_and_cut_where_shares_and_pieces_meet(
    group: LocalGroup, read_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_plans, "piece_nbytes", lambda _: 1000)
    backends = [ColumnBackend(group) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(backend.serve()) for backend in backends]
        sync = stack.enter_context(group.connect(*urls, fan_out="always", read_share=read_share))
        for verify in (None, "digest", None):
            version = group.write_and_publish()
            report = sync.update(version, verify=verify)
            assert bytes_from_trainers(report) == report.ranks[0].read_nbytes
            assert report.arena_bytes == 0
            for backend in backends:
                for name, shape in SHAPES.items():
                    whole = values_of(name, shape, version, torch.float32)
                    held = backend.columns.parameter(name)
                    assert torch.equal(held, backend.columns.part(name, whole)), name


def test_engines_that_are_asked_ahead_read_together_too(sync: WeightSync, group: LocalGroup) -> None:
    sync.update(group.write_and_publish())
    version = group.write()

    def publish() -> None:
        for trainer in group.trainers:
            trainer.publish(version)

    with contextlib.ExitStack() as stack:
        timer = threading.Timer(0.3, publish)
        stack.callback(timer.join)
        timer.start()
        report = sync.update(version)
    check(sync, report)
    assert bytes_from_trainers(report) == report.ranks[0].read_nbytes


@pytest.mark.parametrize(
    "options", [{"fan_out": "never"}, {"fan_out": "auto"}, {"fan_out": "always", "mode": "inplace"}]
)
def test_where_it_is_not_wanted_or_no_gain_everyone_reads_alone(
    group: LocalGroup, engines: list[str], options: dict[str, Any]
) -> None:
    with group.connect(*engines, **options) as sync:
        report = sync.update(group.write_and_publish())
        assert sync.verify().bytes_equal
        assert all(read_from_trainers(row) == row.read_nbytes for row in report.ranks)
        assert all(row.neighbours_nbytes == 0 for row in report.ranks)


def test_a_neighbour_that_gives_nothing_is_done_without(
    sync: WeightSync, group: LocalGroup, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync.update(group.write_and_publish())
    publish = relay.Relay._publish

    def keep_silent(self: relay.Relay, turn: relay.Turn) -> None:
        if self._reader.engine != engines[1]:
            publish(self, turn)

    monkeypatch.setattr("rdt_core.connection.PATIENCE_S", 0.2)
    monkeypatch.setattr(relay.Relay, "_publish", keep_silent)
    report = sync.update(group.write_and_publish())
    check(sync, report)
    by_engine = {row.engine: row for row in report.ranks}
    silent, others = by_engine[engines[1]], [by_engine[engines[0]], by_engine[engines[2]]]
    assert silent.neighbours_nbytes > silent.read_nbytes / 2
    assert all(0 < row.neighbours_nbytes < row.read_nbytes / 2 for row in others)
    monkeypatch.setattr(relay.Relay, "_publish", publish)
    report = sync.update(group.write_and_publish())
    check(sync, report)
    assert bytes_from_trainers(report) == report.ranks[0].read_nbytes


def test_a_circle_that_cannot_meet_reads_from_the_trainers_and_is_not_tried_for_ever(
    sync: WeightSync, group: LocalGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def fail(*_: Any) -> None:
        tries.append(1)
        raise RdtError("nobody is met here.")

    monkeypatch.setattr(relay.Relay, "_open", fail)
    for _ in range(5):
        report = sync.update(group.write_and_publish())
        check(sync, report)
        assert all(row.neighbours_nbytes == 0 for row in report.ranks)
    assert len(tries) == 3 * 3


def test_engines_that_come_and_go_change_the_circle(
    sync: WeightSync, group: LocalGroup, engines: list[str]
) -> None:
    sync.update(group.write_and_publish())
    sync.remove_engine(engines[0])
    report = sync.update(group.write_and_publish())
    check(sync, report)
    assert len(report.ranks) == 2
    assert bytes_from_trainers(report) == report.ranks[0].read_nbytes
    sync.add_engine(engines[0])
    report = sync.update(group.write_and_publish())
    check(sync, report)
    assert len(report.ranks) == 3
    sync.remove_engine(engines[0])
    sync.remove_engine(engines[1])
    report = sync.update(group.write_and_publish())
    check(sync, report)
    assert read_from_trainers(report.ranks[0]) == report.ranks[0].read_nbytes


def test_a_newcomer_that_borrowed_its_first_version_reads_together_soon(
    group: LocalGroup, engines: list[str]
) -> None:
    with group.connect(*engines[:2], fan_out="always") as sync:
        version = sync.update(group.write_and_publish()).version
        for trainer in group.trainers:
            trainer.publisher.release()
        assert sync.add_engine(engines[2]) == version
        reports = [sync.update(group.write_and_publish()) for _ in range(2)]
        check(sync, reports[-1])
        assert all(row.source == "trainers" for row in reports[-1].ranks)
        assert bytes_from_trainers(reports[-1]) == reports[-1].ranks[0].read_nbytes


def test_a_version_that_failed_once_is_read_together_the_second_time(
    sync: WeightSync, group: LocalGroup, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync.update(group.write_and_publish())
    version = group.write_and_publish()
    pull = relay.Relay._pull

    def fail_once(self: relay.Relay, *args: Any) -> Any:
        monkeypatch.setattr(relay.Relay, "_pull", pull)
        httpx.post(f"{engines[2]}/rdt/abort", json={}, timeout=30)
        return pull(self, *args)

    monkeypatch.setattr(relay.Relay, "_pull", fail_once)
    with contextlib.suppress(UpdateFailedError):
        sync.update(version)
    if sync.version < version:
        report = sync.update(version)
        check(sync, report)
        assert bytes_from_trainers(report) == report.ranks[0].read_nbytes
    assert sync.verify().bytes_equal


def test_landing_memory_is_not_written_while_a_neighbour_reads_it(
    sync: WeightSync, group: LocalGroup, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync.update(group.write_and_publish())
    is_in_mid_read, may_go_on = threading.Event(), threading.Event()
    pull = relay.Relay._pull_under

    def stand_still(self: relay.Relay, lease: int, source: Any, turn: relay.Turn) -> Any:
        if self._reader.engine == engines[1] and not is_in_mid_read.is_set():
            is_in_mid_read.set()
            assert may_go_on.wait(WAIT_S)
        return pull(self, lease, source, turn)

    def state() -> str:
        return str(httpx.get(f"{engines[2]}/rdt/status", timeout=WAIT_S).json()["ranks"][0]["state"])

    def update(version: int) -> None:
        with contextlib.suppress(UpdateFailedError):
            sync.update(version)

    monkeypatch.setattr(relay.Relay, "_pull_under", stand_still)
    updating = threading.Thread(target=update, args=(group.write_and_publish(),))
    updating.start()
    # The second engine begins with what the third has landed.
    assert is_in_mid_read.wait(WAIT_S)
    wait_for(lambda: state() == "prepared", WAIT_S)
    following = group.write_and_publish()
    # Another driver has the third engine read the next version.
    asked = {"version": following, "attempt": "another's", "timeout_s": WAIT_S}
    httpx.post(f"{engines[2]}/rdt/prepare", json=asked, timeout=WAIT_S).raise_for_status()
    with pytest.raises(TimeoutError):
        wait_for(lambda: state() == "prepared", 1.0)
    assert state() == "reading"
    may_go_on.set()
    # The first driver, whose version is superseded, may have all engines forget what they read.
    wait_for(lambda: state() != "reading", WAIT_S)
    updating.join(WAIT_S)
    check(sync, sync.update(following))


def test_reads_that_rest_are_shared_too(
    group: LocalGroup, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdt_core.link_plans.piece_nbytes", lambda _: 1000)
    with group.connect(*engines, fan_out="always", read_share=0.9) as sync:
        for _ in range(2):
            report = sync.update(group.write_and_publish(), verify="digest")
            check(sync, report)
            assert bytes_from_trainers(report) == report.ranks[0].read_nbytes


def test_trainers_that_are_replaced_are_read_together_again(sync: WeightSync, group: LocalGroup) -> None:
    sync.update(group.write_and_publish())
    group.trainers[0].close()
    group.trainers[0].attach(group.name, group.channel)
    reports = [sync.update(group.write_and_publish()) for _ in range(3)]
    check(sync, reports[-1])
    assert bytes_from_trainers(reports[-1]) == reports[-1].ranks[0].read_nbytes


def test_a_coordinator_that_was_restarted_breaks_no_circle_for_good(
    sync: WeightSync, group: LocalGroup
) -> None:
    sync.update(group.write_and_publish())
    group.channel.restart()
    reports = [sync.update(group.write_and_publish()) for _ in range(4)]
    check(sync, reports[-1])
    assert bytes_from_trainers(reports[-1]) == reports[-1].ranks[0].read_nbytes


def test_links_that_are_closed_are_an_error_and_no_empty_read(sync: WeightSync, group: LocalGroup) -> None:
    version = sync.update(group.write_and_publish()).version
    close = connection.Connection._cut_links

    def close_for_good(self: connection.Connection, num_shares: int) -> bool:
        are_open = close(self, num_shares)
        self.links.close()
        return are_open

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection.Connection, "_cut_links", close_for_good)
        sync.remove_engine(next(iter(sync.engines)))
        with pytest.raises(UpdateFailedError, match="links to the trainers are closed"):
            sync.update(group.write_and_publish())
    assert sync.version == version


def test_a_policy_that_there_is_not_is_refused_by_an_engine() -> None:
    with pytest.raises(WireFormatError, match="'sometimes'"):
        parse_connect({"group": "g", "engine": "e", "fan_out": "sometimes"})
