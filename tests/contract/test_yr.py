"""What the yr transport promises beyond the contract, over real data workers of openYuanrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch

from rdt_core import WeightSync
from rdt_core.errors import PullTimeoutError, SourceDiedError, TransportError, TransportUnavailableError
from rdt_core.transports.offers import offered_transports
from rdt_core.transports.yr import REQUEST_TIMEOUT_MS, YrTransport
from tests.contract.sources import LocalSource
from tests.data_workers import data_workers, find_free_ports
from tests.local_group import local_group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.data_workers import DataWorker

TIMEOUT_S = 30.0

pytestmark = pytest.mark.yr


def transport_at(worker: DataWorker, max_object_nbytes: int = 1000) -> YrTransport:
    """A transport of this process that talks to one worker, with small objects."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in worker.env.items():
            patch.setenv(name, value)
        return YrTransport(max_object_nbytes)


@pytest.fixture
def source(two_data_workers: list[DataWorker]) -> Iterator[LocalSource]:
    made = LocalSource(transport_at(two_data_workers[0]), (2500, 3))
    yield made
    made.close()


@pytest.fixture
def reader(two_data_workers: list[DataWorker]) -> YrTransport:
    return transport_at(two_data_workers[1])


def blank() -> list[torch.Tensor]:
    return [torch.full((size,), 255, dtype=torch.uint8) for size in (2500, 3)]


def test_views_larger_than_an_object_are_split_and_whole_again(
    source: LocalSource, reader: YrTransport
) -> None:
    wanted = [i % 251 for i in range(2500)]
    source.write(0, wanted)
    source.write(1, [1, 2, 3])
    targets = blank()
    reader.open(source.export(), targets, trainer_rank=0).pull(0, timeout_s=TIMEOUT_S)
    assert targets[0].tolist() == wanted
    assert targets[1].tolist() == [1, 2, 3]


def test_a_version_stays_what_it_was_when_the_trainer_writes_on(
    source: LocalSource, reader: YrTransport
) -> None:
    source.write(1, [1, 1, 1])
    targets = blank()
    link = reader.open(source.export(), targets, trainer_rank=0)
    source.publish(1)
    source.write(1, [2, 2, 2])
    link.pull(1, timeout_s=TIMEOUT_S)
    assert targets[1].tolist() == [1, 1, 1]


def test_an_older_version_is_gone_and_never_brought_for_a_newer(
    source: LocalSource, reader: YrTransport
) -> None:
    link = reader.open(source.export(), blank(), trainer_rank=4)
    source.publish(1)
    link.pull(1, timeout_s=TIMEOUT_S)
    source.publish(2)
    with pytest.raises(SourceDiedError, match="version 1 is not in the store"):
        link.pull(1, timeout_s=TIMEOUT_S)
    with pytest.raises(SourceDiedError, match="trainer rank 4"):
        link.pull(3, timeout_s=TIMEOUT_S)


def test_a_closed_export_leaves_nothing_in_the_store(source: LocalSource, reader: YrTransport) -> None:
    link = reader.open(source.export(), blank(), trainer_rank=0)
    source.close()
    with pytest.raises(SourceDiedError):
        link.pull(0, timeout_s=TIMEOUT_S)


def test_a_whole_sync_goes_through_the_store(
    two_data_workers: list[DataWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in two_data_workers[0].env.items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(local_group())
        engine = stack.enter_context(group.serve_engine())
        sync = stack.enter_context(
            WeightSync.connect(group.name, [engine], transport="yr", channel=group.channel)
        )
        for _ in range(2):
            report = sync.update(group.write_and_publish())
            assert sync.verify().bytes_equal
            assert report.ranks[0].transports == {0: "yr", 1: "yr"}


def test_a_store_without_room_is_an_error_that_names_the_option(two_data_workers: list[DataWorker]) -> None:
    transport = transport_at(two_data_workers[0], 16 * 2**20)
    big = LocalSource(transport, (80 * 2**20,))
    with pytest.raises(TransportError, match="shared_memory_size_mb"):
        big.export()
    small = LocalSource(transport, (2**20,))
    small.export()
    small.close()


def test_a_worker_that_stands_still_or_is_gone_is_an_error_in_time() -> None:
    with data_workers(1) as (worker,):
        transport = transport_at(worker)
        source = LocalSource(transport, (2500, 3))
        link = transport.open(source.export(), blank(), trainer_rank=2)
        link.pull(0, timeout_s=TIMEOUT_S)
        os.kill(worker.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises((TransportError, PullTimeoutError), match="trainer rank 2"):
            link.pull(0, timeout_s=1.0)
        assert time.monotonic() - started < 4 * REQUEST_TIMEOUT_MS / 1000
        os.kill(worker.pid, signal.SIGCONT)
        link.pull(0, timeout_s=TIMEOUT_S)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(TransportError):
            link.pull(0, timeout_s=TIMEOUT_S)


def test_a_worker_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("yr.datasystem", reason="openyuanrong-datasystem is not installed")
    (port,) = find_free_ports(1)
    monkeypatch.setenv("DATASYSTEM_HOST", "127.0.0.1")
    monkeypatch.setenv("DATASYSTEM_PORT", str(port))
    with pytest.raises(TransportUnavailableError, match=f"127.0.0.1:{port}"):
        YrTransport()
    monkeypatch.delenv("DATASYSTEM_PORT")
    with pytest.raises(TransportUnavailableError, match="DATASYSTEM_PORT"):
        YrTransport()


def test_it_is_offered_where_a_worker_is_named(
    monkeypatch: pytest.MonkeyPatch, two_data_workers: list[DataWorker]
) -> None:
    monkeypatch.delenv("DATASYSTEM_PORT", raising=False)
    assert "yr" not in offered_transports("cpu")
    for name, value in two_data_workers[0].env.items():
        monkeypatch.setenv(name, value)
    assert "yr" in offered_transports("npu:0")


@pytest.mark.parametrize(("first", "second"), [("nixl._api", "yr"), ("yr.datasystem", "nixl")])
def test_nixl_and_the_data_system_are_kept_out_of_one_process(first: str, second: str) -> None:
    pytest.importorskip("yr.datasystem", reason="openyuanrong-datasystem is not installed")
    code = (
        f"import {first}\n"
        "from rdt_core.transports import make_transport\n"
        "try:\n"
        f"    make_transport('{second}')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.startswith("TransportUnavailableError"), done.stderr
    assert first in done.stdout
