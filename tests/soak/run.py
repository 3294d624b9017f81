"""Many versions through one group, and what every process of it holds: ``python -m tests.soak.run``.

Two trainer ranks and an engine in processes of their own, over Ray and NIXL on the CPU. The resident memory
of each is looked at over and over; the growth that counts is from the end of the warm-up to the last version.
Prints a table and, with ``--out``, writes it as JSON; ends with 1 when a trainer rank or the engine grew by
more than ``--max-growth``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import ray

from rdt_core import WeightSync
from tests.contract.world import expected_fingerprint
from tests.integration.conftest import toy_engine
from tests.integration.toy_trainer import start_trainers
from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TIMEOUT_S = 300.0
WARM_UP = 0.2
"""Part of the versions before the first look that counts: allocators and Ray's caches fill up until then."""

NUM_LOOKS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One process over the versions that counted.

    Args:
        who: its part in the group.
        first_mb: resident memory after the warm-up.
        last_mb: resident memory after the last version.
        growth: the difference over the first, 0.01 for 1 %.
        num_fds: open at the end, less those open after the warm-up.
        num_threads: the same of threads.
        is_limited: whether its growth decides the outcome.
    """

    who: str
    first_mb: float
    last_mb: float
    growth: float
    num_fds: int
    num_threads: int
    is_limited: bool


@dataclass(frozen=True, slots=True)
class Look:
    """What one process held at one time."""

    rss_mb: float
    num_fds: int
    num_threads: int


def look_at(processes: Mapping[str, psutil.Process]) -> dict[str, Look]:
    """What every process holds now."""
    return {
        who: Look(process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
        for who, process in processes.items()
    }


def find_processes(trainer_pids: Sequence[int]) -> dict[str, psutil.Process]:
    """Everybody in the group, by part."""
    found = {f"trainer rank {rank}": psutil.Process(pid) for rank, pid in enumerate(trainer_pids)}
    for child in psutil.Process().children(recursive=True):
        words = " ".join(child.cmdline())
        if "toy_engine" in words:
            found["engine"] = child
        elif "Coordinator" in words:
            found["coordinator"] = child
    return {**found, "driver": psutil.Process()}


def soak(num_versions: int) -> list[Growth]:
    """Bring an engine through this many versions; blocks for minutes."""
    group = f"soak-{uuid.uuid4().hex[:8]}"
    looks: list[dict[str, Look]] = []
    with local_ray(), toy_engine() as url:
        ranks = start_trainers(2)
        pids = ray.get([rank.attach.remote(group) for rank in ranks], timeout=TIMEOUT_S)
        with WeightSync.connect(group, [url]) as sync:
            processes = find_processes(pids)
            warm = max(1, int(num_versions * WARM_UP))
            every = max(1, (num_versions - warm) // NUM_LOOKS)
            for version in range(1, num_versions + 1):
                ray.get([rank.write.remote(version) for rank in ranks], timeout=TIMEOUT_S)
                ray.get([rank.publish.remote(version) for rank in ranks], timeout=TIMEOUT_S)
                sync.update(version)
                if version >= warm and (version - warm) % every == 0:
                    looks.append(look_at(processes))
            looks.append(look_at(processes))
            held = httpx.get(f"{url}/fingerprint", timeout=TIMEOUT_S).json()
        for rank in ranks:
            ray.kill(rank)
    if held != expected_fingerprint(num_versions):
        raise RuntimeError(f"the engine does not hold version {num_versions}")
    return [_growth(who, looks[0][who], looks[-1][who]) for who in processes]


def _growth(who: str, first: Look, last: Look) -> Growth:
    return Growth(
        who=who,
        first_mb=round(first.rss_mb, 1),
        last_mb=round(last.rss_mb, 1),
        growth=round(last.rss_mb / first.rss_mb - 1, 5),
        num_fds=last.num_fds - first.num_fds,
        num_threads=last.num_threads - first.num_threads,
        is_limited=who == "engine" or who.startswith("trainer"),
    )


def show(found: Sequence[Growth]) -> str:
    """The table."""
    rows = ["process          MiB after warm-up   MiB at the end   growth   fds   threads"]
    rows += [
        f"{row.who:<16} {row.first_mb:>17} {row.last_mb:>16} {row.growth:>8.2%} {row.num_fds:>+5} "
        f"{row.num_threads:>+9}"
        for row in found
    ]
    return "\n".join(rows)


def main() -> int:
    """Run and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--max-growth", type=float, default=0.01)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    found = soak(arguments.versions)
    seconds = time.perf_counter() - started
    print(f"{arguments.versions} versions in {seconds:.0f} s")  # noqa: T201  a command's own output
    print(show(found))  # noqa: T201
    if arguments.out:
        result = {
            "versions": arguments.versions,
            "seconds": seconds,
            "processes": [asdict(row) for row in found],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row.is_limited and row.growth > arguments.max_growth for row in found))


if __name__ == "__main__":
    sys.exit(main())
