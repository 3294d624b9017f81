"""The last sync as a Chrome trace, for Perfetto or ``chrome://tracing``: who read what from whom, when.

Driver, engine ranks and links are rows; times are each side's own wall clock, so that rows of hosts whose
clocks differ are shifted by that difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_DRIVER = 1
_MICROSECONDS = 1e6


def make_trace(sync: Mapping[str, Any]) -> dict[str, Any]:
    """The trace of one sync, ready for JSON.

    Args:
        sync: a row of ``CoordinatorClient.history`` of a completed sync with its ranks, or
            ``SyncReport.as_dict()``.
    """
    start = float(sync["started_unix_s"])
    events = list(_driver_events(sync))
    for number, rank in enumerate(sync["ranks"]):
        events.extend(_rank_events(_DRIVER + 1 + number, rank, int(sync["version"])))
    for event in events:
        if "ts" in event:
            event["ts"] = (event["ts"] - start) * _MICROSECONDS
    named = {"group": sync.get("group", ""), "version": sync["version"], "started_unix_s": start}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": named}


def _driver_events(sync: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield _name("process_name", _DRIVER, 0, "driver")
    yield _name("thread_name", _DRIVER, 1, "phases")
    start = float(sync["started_unix_s"])
    yield _slice(
        f"sync {sync['version']}", _DRIVER, start, float(sync["total_s"]), {"nbytes": sync["nbytes"]}
    )
    waited, prepared = float(sync["publish_wait_s"]), float(sync["prepare_s"])
    yield _slice("publish_wait", _DRIVER, start, waited, {})
    yield _slice("prepare", _DRIVER, start + waited, prepared, {})
    committing = max(0.0, float(sync["total_s"]) - waited - prepared)
    yield _slice("commit", _DRIVER, start + waited + prepared, committing, {"stall_s": sync["stall_s"]})


def _rank_events(process: int, rank: Mapping[str, Any], version: int) -> Iterator[dict[str, Any]]:
    yield _name("process_name", process, 0, f"{rank['engine']} rank {rank['rank']}")
    yield _name("thread_name", process, 1, "prepare and commit")
    args = {"version": version, "nbytes": rank["nbytes"], "num_reads": rank["num_reads"]}
    yield _slice("prepare", process, float(rank["prepare_started_unix_s"]), float(rank["prepare_s"]), args)
    yield _slice("commit", process, float(rank["commit_started_unix_s"]), float(rank["commit_s"]), args)
    for link in rank["links"]:
        thread = 2 + int(link["trainer_rank"])
        yield _name("thread_name", process, thread, f"from trainer {link['trainer_rank']}")
        seconds, nbytes = float(link["seconds"]), int(link["nbytes"])
        what = {
            "transport": link["transport"],
            "nbytes": nbytes,
            "num_reads": link["num_reads"],
            "gigabytes_per_s": nbytes / seconds / 1e9 if seconds else 0.0,
        }
        name = f"read from trainer {link['trainer_rank']}"
        yield _slice(name, process, float(link["started_unix_s"]), seconds, what, thread)


def _slice(
    name: str, process: int, started_s: float, seconds: float, args: Mapping[str, Any], thread: int = 1
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": started_s,
        "dur": seconds * _MICROSECONDS,
        "args": dict(args),
    }


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
