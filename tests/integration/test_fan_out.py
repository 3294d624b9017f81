"""Engine processes of one node that read together, over Ray and NIXL."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import httpx
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
