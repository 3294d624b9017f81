"""Engine processes of one node that read together, over Ray and NIXL."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import ray

from rdt_core import WeightSync
from tests.contract.world import expected_fingerprint
from tests.integration.conftest import toy_engine
from tests.integration.toy_trainer import start_trainers

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdt_core.report import SyncReport

TIMEOUT_S = 120.0


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=TIMEOUT_S)


def fingerprint(url: str) -> dict[str, str]:
    return dict(httpx.get(f"{url}/fingerprint", timeout=TIMEOUT_S).json())


def write_and_publish(ranks: list[Any], version: int) -> None:
    get([rank.write.remote(version) for rank in ranks])
    get([rank.publish.remote(version) for rank in ranks])


def test_engines_read_together_and_one_that_is_killed_costs_the_others_nothing(
    ray_cluster: str, group: str, start_toy_engine: Callable[..., str]
) -> None:
    assert ray_cluster
    ranks = start_trainers(2)
    get([rank.attach.remote(group) for rank in ranks])
    mortal = contextlib.ExitStack()
    urls = [mortal.enter_context(toy_engine()), *(start_toy_engine() for _ in range(2))]

    def from_trainers(report: SyncReport) -> int:
        return sum(link.nbytes for row in report.ranks for link in row.links)

    options: dict[str, Any] = {"fan_out": "always", "commit_policy": "engine"}
    with mortal, WeightSync.connect(group, engines=urls, **options) as sync:
        for version in (1, 2):
            write_and_publish(ranks, version)
            report = sync.update(version=version)
            assert [fingerprint(url) for url in urls] == [expected_fingerprint(version)] * 3
            assert from_trainers(report) == report.ranks[0].read_nbytes
        killed, *others = urls
        mortal.close()
        reports = []
        for version in (3, 4):
            write_and_publish(ranks, version)
            reports.append(sync.update(version=version, timeout_s=30.0))
            report = reports[-1]
            assert [failure.engine for failure in report.failures] == [killed]
            assert [fingerprint(url) for url in others] == [expected_fingerprint(version)] * 2
        # The two of them read together, without the third.
        assert from_trainers(reports[-1]) == reports[-1].ranks[0].read_nbytes
    for rank in ranks:
        ray.kill(rank)


def listener_on(port: int) -> psutil.Process:
    """The child process that serves there."""

    def listens(process: psutil.Process) -> bool:
        sockets = process.net_connections("tcp")
        return any(at.laddr.port == port for at in sockets if at.status == psutil.CONN_LISTEN)

    return next(child for child in psutil.Process().children(recursive=True) if listens(child))


def count_between(one: psutil.Process, other: psutil.Process) -> int:
    """TCP connections between two processes of this host."""
    ports = {at.laddr.port for at in other.net_connections("tcp")}
    return sum(at.raddr.port in ports for at in one.net_connections("tcp") if at.raddr)


def test_an_engine_that_comes_and_goes_leaves_no_sockets_between_the_others(
    ray_cluster: str, group: str, start_toy_engine: Callable[..., str]
) -> None:
    assert ray_cluster
    ranks = start_trainers(1)
    get([rank.attach.remote(group) for rank in ranks])
    urls = [start_toy_engine() for _ in range(3)]
    one, other = (listener_on(int(url.rpartition(":")[2])) for url in urls[:2])
    numbers = []
    with WeightSync.connect(group, engines=urls, fan_out="always") as sync:
        for cycle in range(6):
            # Two of them read together, then all three.
            sync.remove_engine(urls[2])
            for step, joins in enumerate((False, True)):
                if joins:
                    sync.add_engine(urls[2])
                version = 2 * cycle + step + 1
                write_and_publish(ranks, version)
                report = sync.update(version=version)
                assert len(report.ranks) == 2 + step
                assert all(row.neighbours_nbytes for row in report.ranks[:2])
            numbers.append(count_between(one, other))
    assert min(numbers) > 0
    assert numbers[-1] <= numbers[1] + 2
    for rank in ranks:
        ray.kill(rank)
