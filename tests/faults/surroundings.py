"""Faults of what surrounds a group: nodes, Ray's head, disks, file descriptors.

Each needs a Ray cluster of its own, so each is a process: ``python -m tests.faults.surroundings WHO WHAT
WHEN`` prints what it measured as a line of JSON, or why it cannot be done here.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray

from tests.faults.cells import UPDATE_TIMEOUT_S
from tests.faults.conftest import GatedEngine
from tests.faults.faulty_trainer import FaultyTrainer
from tests.faults.namespaces import ImpossibleHereError
from tests.faults.partition import far_ranks, two_nodes
from tests.faults.results import Row
from tests.faults.stage import Call, Stage
from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ANSWER = "surroundings: "


@contextlib.contextmanager
def stage_in(address: str) -> Iterator[Stage]:
    """A group in a cluster that this process has joined."""
    made: list[GatedEngine] = []
    with tempfile.TemporaryDirectory(prefix="rdt-gates-", dir="/tmp") as folder:

        def start() -> GatedEngine:
            made.append(GatedEngine(Path(folder) / str(len(made))))
            return made[-1]

        stage = Stage(address, start)
        try:
            yield stage
        finally:
            for engine in made:
                engine.stop()


def strike(
    stage: Stage, point: str, harm: Callable[[], None], repair: Callable[[], None], *, is_first: bool = False
) -> Row:
    """One update with harm in it, then the repair and the next update.

    Args:
        stage: with everything running.
        point: of the read or of the commit.
        harm: what is done there.
        repair: what is done before the next update.
        is_first: whether to harm before the update begins, and not at the gate.
    """
    stage.begin("staged")
    old, new = stage.version, stage.version + 1
    stage.publish(new)
    sync, gated = stage.sync, stage.engines[0]
    if is_first:
        harm()
        harmed = time.monotonic()
        call = Call(lambda: sync.update(new, timeout_s=UPDATE_TIMEOUT_S))
    else:
        gated.close_gate(point)
        call = Call(lambda: sync.update(new, timeout_s=UPDATE_TIMEOUT_S))
        gated.wait_at(point)
        harm()
        harmed = time.monotonic()
        gated.open_gate(point)
    sees = call.finish()
    say(f"{sees or 'done'} after {call.ended - harmed:.1f} s: {call.error}")
    serves = {stage.served(engine, old, new) for engine in stage.engines}
    began = time.monotonic()
    repair()
    stage.publish(new + 1)
    stage.sync.update(new + 1)
    stage.check_all_serve(new + 1)
    return Row(
        sees=sees,
        seconds=max(0.0, call.ended - harmed),
        serves="; ".join(sorted(serves)),
        repair_s=time.monotonic() - began,
    )


def lose_node() -> Row:
    """The node of a trainer rank goes, with everything on it, while it is read."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="rdt", dir="/tmp") as folder:
        # Ray writes the head's address there, and makes the folder only where no other is asked for.
        Path("/tmp/ray").mkdir(exist_ok=True)  # noqa: S108  Ray's own
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "resources": {"first": 1},
                "temp_dir": folder,
                "object_store_memory": 100 * 2**20,
            },
        )
        try:
            second = cluster.add_node(num_cpus=2, resources={"second": 1}, object_store_memory=100 * 2**20)
            ray.init(address=cluster.address, namespace="rdt", log_to_driver=False)
            with stage_in(cluster.address) as stage:
                stage.make_ranks = lambda: _ranks_on("first", "second")

                def repair() -> None:
                    stage.make_ranks = lambda: _ranks_on("first", "first")
                    stage.start_trainers()

                def harm() -> None:
                    cluster.remove_node(second, allow_graceful=False)
                    # A machine takes its processes with it; here they would outlive their raylet for a while.
                    os.kill(stage.pids[1], signal.SIGKILL)

                return strike(stage, "during read", harm, repair)
        finally:
            ray.shutdown()
            cluster.shutdown()


def _ranks_on(*nodes: str) -> list[Any]:
    actor = ray.remote(FaultyTrainer)
    return [
        actor.options(num_cpus=0, resources={node: 0.1}).remote(rank, len(nodes))
        for rank, node in enumerate(nodes)
    ]


def lose_head() -> Row:
    """Ray's head is killed, with the node that everybody has joined; then there is another cluster."""
    with contextlib.ExitStack() as clusters:
        address = clusters.enter_context(local_ray())
        with stage_in(address) as stage:
            ray_processes = [
                process
                for process in psutil.Process().children(recursive=True)
                if process.name() in ("gcs_server", "raylet")
            ]

            def harm() -> None:
                # The machine takes the trainers with it, which are Ray's; an engine is a process of its own.
                trainers = [psutil.Process(pid) for pid in stage.pids]
                for process in (*ray_processes, *trainers):
                    process.kill()
                psutil.wait_procs(trainers, timeout=30)

            def repair() -> None:
                clusters.close()
                clusters.enter_context(local_ray())
                stage.ranks = []
                stage.start_trainers()
                stage.sync.close()
                stage.connect("staged")

            return strike(stage, "before read", harm, repair, is_first=True)


def fill_disk() -> Row:
    """The disk of Ray's files is full, on the node of everybody, from before the read."""
    with tempfile.TemporaryDirectory(prefix="full", dir="/tmp") as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode != 0:
            raise ImpossibleHereError(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
        try:
            with local_ray(below=folder) as address, stage_in(address) as stage:
                filler = Path(folder) / "filler"
                return strike(stage, "before read", lambda: _fill(filler), filler.unlink, is_first=True)
        finally:
            subprocess.run(["umount", "-l", folder], check=False)


def _fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def limit_fds() -> Row:
    """An engine may open no file descriptor more, from before the read."""
    with local_ray() as address, stage_in(address) as stage:

        def limit(number: int) -> None:
            pid = stage.engines[0].process.pid
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (number, hard))

        def harm() -> None:
            # Beside what it has, one for whoever asks what it serves.
            limit(psutil.Process(stage.engines[0].process.pid).num_fds() + 1)

        return strike(stage, "before read", harm, lambda: limit(1024), is_first=True)


def cut_link(point: str) -> Row:
    """Nothing reaches the trainers' host any more, nor comes from it; then the link is mended."""
    with two_nodes() as far, stage_in(ray.get_runtime_context().gcs_address) as stage:
        stage.make_ranks = lambda: far_ranks(2)

        def harm() -> None:
            where = stage.coordinator().__ray_call__.remote(lambda _: ray.util.get_node_ip_address())
            say(f"the coordinator is at {ray.get(where, timeout=UPDATE_TIMEOUT_S)}")
            far.cut()

        return strike(stage, point, harm, far.mend)


SCENARIOS: dict[tuple[str, str], Callable[[str], Row]] = {
    ("node of a trainer", "lost"): lambda _: lose_node(),
    ("Ray head", "SIGKILL"): lambda _: lose_head(),
    ("disk", "full"): lambda _: fill_disk(),
    ("engine", "fd limit"): lambda _: limit_fds(),
    ("link to the trainers", "cut"): cut_link,
}
"""By victim and fault, as the cells name them; called with the point."""


def say(line: str) -> None:
    """For a person."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201  a command


def main() -> None:
    """Play one scenario."""
    try:
        answer: dict[str, Any] = asdict(SCENARIOS[sys.argv[1], sys.argv[2]](sys.argv[3]))
    except ImpossibleHereError as error:
        answer = {"impossible": str(error)}
    print(ANSWER + json.dumps(answer), flush=True)  # noqa: T201  read by who started us
    os._exit(0)  # a cluster that has lost its node is not waited for


if __name__ == "__main__":
    main()
