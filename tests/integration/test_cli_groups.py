"""``rdt status`` and ``rdt update`` on a running cluster, with real trainer ranks and a real engine."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import ray
from typer.testing import CliRunner

from rdt_core import WeightSync
from rdt_core.cli.app import app
from tests.contract.world import expected_fingerprint
from tests.integration.toy_trainer import SHAPES, start_trainers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT_S = 120.0


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "TERM": "dumb"})
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def look(group: str) -> dict[str, Any]:
    (found,) = json.loads(run("status", group, "--json"))["groups"]
    return dict(found)


@pytest.fixture(scope="module")
def engine(start_toy_engine: Callable[..., str]) -> str:
    return start_toy_engine()


@pytest.fixture
def trainers(ray_cluster: str, group: str) -> Iterator[list[Any]]:
    """Two rank processes attached under the test's group."""
    assert ray_cluster
    ranks = start_trainers(2)
    ray.get([rank.attach.remote(group) for rank in ranks], timeout=TIMEOUT_S)
    yield ranks
    for rank in ranks:
        ray.kill(rank)


def test_update_brings_an_engine_to_what_is_published_and_status_tells_of_it(
    trainers: list[Any], group: str, engine: str
) -> None:
    shown = run("update", group, "--engine", engine, code=1)
    assert shown.startswith("error: trainer ranks [0, 1] have not published")
    ray.get([rank.write.remote(3) for rank in trainers], timeout=TIMEOUT_S)
    ray.get([rank.publish.remote(3) for rank in trainers], timeout=TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while any(row["version"] != 3 for row in look(group)["trainers"].values()):
        assert time.monotonic() < deadline

    assert "read_share" in run("update", group, "--engine", engine, "--read-share", "2", code=1)
    report = json.loads(run("update", group, "--engine", engine, "--read-share", "0.5", "--verify", "--json"))

    assert (report["version"], report["num_tensors"], report["bytes_equal"]) == (3, len(SHAPES), True)
    assert httpx.get(f"{engine}/fingerprint", timeout=TIMEOUT_S).json() == expected_fingerprint(3)
    found = look(group)
    assert [row["alive"] for row in found["trainers"].values()] == [True, True]
    assert found["engines"] == []
    while not (syncs := look(group)["syncs"]):
        assert time.monotonic() < deadline
    assert [(sync["version"], sync["outcome"]) for sync in syncs] == [(3, "synced")]
    table = run("status")
    assert f"Group {group}: 2 trainer ranks" in table
    assert "synced" in table
    # The same version again: the coordinator's history is for people, the engine itself refuses.
    assert "error: " in run("update", group, "--engine", engine, "--version", "4", "--timeout", "1", code=1)


def test_status_shows_what_a_connected_engine_reads_over(
    trainers: list[Any], group: str, engine: str
) -> None:
    assert len(trainers) == 2
    with WeightSync.connect(group, [engine]):
        assert "2 x nixl" in run("status", group)


def test_an_unknown_group_is_one_sentence(ray_cluster: str) -> None:
    assert ray_cluster
    assert run("status", "nobody", code=1).startswith("error: there is no sync group 'nobody'")
