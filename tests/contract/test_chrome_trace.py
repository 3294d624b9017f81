"""``rdt trace``: the last sync in the form that Perfetto and chrome://tracing read."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core.chrome_trace import make_trace
from rdt_core.client import CoordinatorClient, RayChannel
from tests.local_group import local_group, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rdt_core.report import SyncReport


@pytest.fixture(scope="module")
def report() -> Iterator[SyncReport]:
    """Of a sync of two engines from two trainer ranks."""
    with (
        local_group() as group,
        group.serve_engine() as one,
        group.serve_engine() as two,
        group.connect(one, two) as sync,
    ):
        yield sync.update(group.write_and_publish())


def slices(trace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["name"] == name]


def test_every_read_is_a_slice_of_its_rank_inside_its_prepare(report: SyncReport) -> None:
    trace = json.loads(json.dumps(make_trace(report.as_dict())))
    for trainer in (0, 1):
        reads = slices(trace, f"read from trainer {trainer}")
        assert len(reads) == 2
        assert {read["args"]["transport"] for read in reads} == {"memory"}
        for read in reads:
            (prepare,) = [event for event in slices(trace, "prepare") if event["pid"] == read["pid"]]
            assert prepare["ts"] <= read["ts"]
            # Durations and starts are of two clocks; a millisecond is more than they differ by here.
            assert read["ts"] + read["dur"] <= prepare["ts"] + prepare["dur"] + 1000
    read_nbytes = sum(row.read_nbytes for row in report.ranks)
    all_reads = [event for event in trace["traceEvents"] if event["name"].startswith("read from")]
    assert sum(event["args"]["nbytes"] for event in all_reads) == read_nbytes


def test_driver_and_engine_ranks_are_named_rows(report: SyncReport) -> None:
    trace = make_trace(report.as_dict())
    named = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert named == ["driver", *(f"{row.engine} rank {row.rank}" for row in report.ranks)]
    (whole,) = slices(trace, f"sync {report.version}")
    assert (whole["ts"], whole["dur"]) == (0.0, report.total_s * 1e6)
    assert trace["otherData"]["version"] == report.version


def test_the_command_writes_the_last_sync_of_a_group(
    ray_cluster: str, report: SyncReport, tmp_path: Path
) -> None:
    pytest.importorskip("typer", reason="typer is not installed; the command line needs it")
    from typer.testing import CliRunner

    from rdt_core.cli.app import app

    assert ray_cluster
    group = f"trace-{uuid.uuid4().hex}"
    channel = RayChannel.create(group)
    client = CoordinatorClient(channel)
    try:
        none_yet = CliRunner().invoke(app, ["trace", group, "--last", "-o", str(tmp_path / "t.json")])
        assert none_yet.exit_code == 1
        assert "completed no sync" in none_yet.output
        client.start_record({"group": group, "outcome": "synced", **report.as_dict()})
        client.start_record({"group": group, "outcome": "failed", "version": 9})
        wait_for(lambda: len(client.history()) == 2)
        out = tmp_path / "trace.json"
        done = CliRunner().invoke(app, ["trace", group, "--last", "-o", str(out), "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["version"] == report.version
        assert json.loads(out.read_text())["otherData"]["group"] == group
    finally:
        channel.end()
