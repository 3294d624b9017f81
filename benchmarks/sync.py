"""How long a sync takes, beside the limits and beside other ways: one run, one table, one JSON file.

    python benchmarks/sync.py --case smollm2 --device cpu
    python benchmarks/sync.py --case qwen3-0.6b --device cuda
    python benchmarks/sync.py --case qwen3-0.6b --device cuda --trainers 2 --engines 2

Trainer ranks, engine ranks and driver are processes of their own. On CUDA trainer rank i is on GPU i and
engine rank i on the GPU i from the last, so that on a machine of several GPUs every byte crosses a link; an
engine's process sees its own GPU only. ``docs/performance.md`` says what the paths are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import ray
import references
import torch
from cases import CASES, num_bytes
from references import Sample
from rich.console import Console
from rich.table import Table
from trainer import TIMEOUT_S, TrainerGroup

from rdt_core import WeightSync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rdt_core.report import SyncReport

WARM_UP = 3
PHASES_AHEAD = ("publish", "prepare", "read", "commit", "commit_request", "stall", "from_publish")
HERE = Path(__file__).parent
SLOW_PATHS = ("seed_design", "ray_nixl", "gloo", "ray_plasma", "safetensors")
REFERENCES: dict[str, dict[str, Callable[[str, int, Sequence[str]], list[Sample]]]] = {
    "cpu": {
        "copy_in_process": references.measure_copy,
        "ray_nixl": references.measure_ray_nixl,
        "gloo": references.measure_gloo,
        "safetensors": references.measure_safetensors,
        "ray_plasma": references.measure_plasma,
    },
    "cuda": {
        "copy_in_process": references.measure_copy,
        "ipc_foreach": references.measure_ipc_foreach,
        "seed_design": references.measure_seed_design,
        "ray_nixl": references.measure_ray_nixl,
        "gloo": references.measure_gloo,
    },
    "several GPUs": {
        "copy_between_gpus": references.measure_peer_copy,
        "nccl_broadcast": references.measure_nccl_broadcast,
        "nccl_send": references.measure_nccl_send,
    },
}
console = Console(stderr=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is synced from where to where.

    Args:
        case: whose tensors.
        device: ``cpu`` or ``cuda``.
        trainers: trainer ranks.
        layout: how they share the tensors, see :func:`cases.held_by_trainer`.
        engines: tensor-parallel ranks of one engine.
        replicas: engines.
        dtype: of the trainers' memory.
        transport: of every link.
        fan_out: whether engines read together, see :meth:`rdt_core.sync.WeightSync.connect`.
        read_share: of the time in which a staged read moves bytes, see the same.
        trainer_gpus: how many GPUs, from the first, the trainers have to themselves; 0 for all GPUs to all.
    """

    case: str
    device: str
    transport: str
    trainers: int = 1
    layout: str = "tp"
    engines: int = 1
    replicas: int = 1
    dtype: str = "bfloat16"
    fan_out: str = "auto"
    read_share: float = 1.0
    trainer_gpus: int = 0

    def trainer_devices(self) -> list[str]:
        """One a trainer rank."""
        return [self._place(rank) for rank in range(self.trainers)]

    def engine_gpus(self, replica: int) -> list[int]:
        """One an engine rank, counted from the last GPU."""
        first, num_free = replica * self.engines, num_gpus() - self.trainer_gpus
        return [num_gpus() - 1 - rank % num_free for rank in range(first, first + self.engines)]

    def _place(self, rank: int) -> str:
        return self.device if self.device == "cpu" else f"cuda:{rank % (self.trainer_gpus or num_gpus())}"


def num_gpus() -> int:
    """GPUs of this machine; 1 where there is none, so that ranks can be counted."""
    return max(torch.cuda.device_count(), 1)


def measure_ours(
    setup: Setup, runs: int, mode: str, name: str = "ours"
) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """Publish, prepare, commit, as the driver sees them; and how memory grew from connect to the end.

    The trainers have done their step when the clock starts, before the driver calls their ``publish`` through
    Ray: ``end_to_end`` has that call in it, ``from_publish`` begins when the first trainer begins to publish.
    Then as in a training loop, ``<name>_ahead``: the trainers publish at the end of their step, and the
    driver has asked the engines while they were at it. ``from_publish`` begins as before.

    Returns:
        The samples of both by name, and facts of the connection.
    """
    samples: list[Sample] = []
    ahead: list[Sample] = []
    with contextlib.ExitStack() as stack:
        # They start while the trainers do.
        engines = [engine_process(setup, replica) for replica in range(setup.replicas)]
        for engine in engines:
            stack.callback(engine.__exit__)
        trainers = TrainerGroup(setup.case, setup.trainer_devices(), setup.dtype, setup.layout)
        trainer_bytes = trainers.memory_bytes()
        trainers.attach("benchmark")
        stack.callback(trainers.close)
        urls = [engine.__enter__() for engine in engines]
        started = time.perf_counter()
        sync = stack.enter_context(
            WeightSync.connect(
                "benchmark",
                engines=urls,
                transport=setup.transport,
                mode=mode,
                fan_out=setup.fan_out,
                read_share=setup.read_share,
                timeout_s=TIMEOUT_S,
            )
        )
        ranks = [rank for of_engine in sync.engines.values() for rank in of_engine]
        facts: dict[str, Any] = {
            "mode": sorted({rank["mode"] for rank in ranks}),
            "connect_s": round(time.perf_counter() - started, 3),
            "num_reads": [rank["num_reads"] for rank in ranks],
            "read_bytes": [rank["read_nbytes"] for rank in ranks],
            "landing_bytes": [rank["landing_nbytes"] for rank in ranks],
            "syncs": 2 * runs,
        }
        engine_bytes = warm_bytes = 0
        for version in range(1, runs + 1):
            trainers.step()
            samples.append(measure_update(sync, version, trainers.start_publish)[0])
            if version == WARM_UP:
                engine_bytes, warm_bytes = sum(map(memory_of, urls)), trainers.memory_bytes()
        report: SyncReport | None = None
        for version in range(runs + 1, 2 * runs + 1):
            sample, report = measure_update(sync, version, trainers.start_step)
            # In these three a step is waited for.
            ahead.append(
                {k: v for k, v in sample.items() if k not in ("ray_call", "publish_wait", "end_to_end")}
            )
        ranks_read = report.ranks if report else ()
        facts["bytes_from_trainers"] = sum(link.nbytes for rank in ranks_read for link in rank.links)
        facts["bytes_from_neighbours"] = sum(rank.neighbours_nbytes for rank in ranks_read)
        facts["trainer_growth_over_syncs_bytes"] = trainers.memory_bytes() - warm_bytes
        facts["trainer_growth_bytes"] = trainers.memory_bytes() - trainer_bytes
        facts["engine_growth_bytes"] = sum(map(memory_of, urls)) - engine_bytes
        if not sync.verify().bytes_equal:
            raise SystemExit("the engine's bytes differ from the trainer's")
        facts["bytes_equal"] = True
    return {name: samples, f"{name}_ahead": ahead}, facts


def measure_update(
    sync: WeightSync, version: int, start: Callable[[int], Callable[[], list[tuple[float, float]]]]
) -> tuple[Sample, SyncReport]:
    """One update, asked for as soon as the trainers were told to publish its version."""
    began = time.perf_counter()
    wait = start(version)
    report = sync.update(version=version)
    ended = time.perf_counter()
    published = wait()
    first = min(begin for begin, _ in published)
    sample = {
        "ray_call": first - began,
        "publish": max(end - begin for begin, end in published),
        "publish_wait": report.publish_wait_s,
        "prepare": report.prepare_s,
        "read": max(rank.prepare_s for rank in report.ranks),
        "commit": report.commit_s,
        "commit_request": report.total_s - report.publish_wait_s - report.prepare_s,
        "stall": report.stall_s,
        "from_publish": ended - first,
        "end_to_end": ended - began,
    }
    return sample, report


def memory_of(url: str) -> int:
    """What an engine process holds on its device."""
    return int(httpx.get(f"{url}/memory", timeout=TIMEOUT_S).json()["bytes"])


class engine_process:  # noqa: N801  reads as a function where it is used
    """An engine process on a free port, as a context manager that yields its URL."""

    def __init__(self, setup: Setup, replica: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(HERE / "engine_process.py"), "--case", setup.case, "--port", str(port)]
        command += ["--device", setup.device, "--gpus", ",".join(map(str, setup.engine_gpus(replica)))]
        self._process = subprocess.Popen(command)

    def __enter__(self) -> str:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                httpx.get(f"{self._url}/memory", timeout=5)
            except httpx.HTTPError:
                time.sleep(0.1)
            else:
                return self._url
        self.__exit__()
        raise SystemExit("the engine process did not start")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(TIMEOUT_S)


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this benchmark's own, which leaves the choice of GPUs to the processes."""
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    with tempfile.TemporaryDirectory(prefix="rdt", dir="/tmp") as temp_dir:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            namespace="rdt",
            object_store_memory=4 * 2**30,
            runtime_env={"env_vars": {"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}},
            _temp_dir=temp_dir,
        )
        try:
            yield
        finally:
            ray.shutdown()


def rows_of(path: str, samples: list[Sample]) -> Iterator[dict[str, Any]]:
    """Summaries of a path's phases, without the warm-up."""
    counted = samples[WARM_UP:]
    for phase in counted[0]:
        values = [1e3 * sample[phase] for sample in counted]
        yield {
            "path": path,
            "phase": phase,
            "median_ms": round(statistics.median(values), 3),
            "min_ms": round(min(values), 3),
            "max_ms": round(max(values), 3),
            "n": len(values),
        }


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("rdt-core", "ray", "nixl", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    limit = next((r["median_ms"] for r in result["results"] if r["path"] == "copy_in_process"), None)
    table = Table(
        title=f"{result['case']}: {result['nbytes'] / 1e6:.0f} MB in {result['num_tensors']} tensors"
    )
    for column in ("path", "phase", "median ms", "min", "max", "x copy", "GB/s"):
        table.add_column(column, justify="left" if column in ("path", "phase") else "right")
    for row in result["results"]:
        median = row["median_ms"]
        moves = row["phase"] in ("end_to_end", "read", "commit") and median > 0
        table.add_row(
            row["path"],
            row["phase"],
            f"{median:.2f}",
            f"{row['min_ms']:.2f}",
            f"{row['max_ms']:.2f}",
            f"{median / limit:.2f}" if limit else "",
            f"{result['nbytes'] / median / 1e6:.2f}" if moves else "",
        )
    Console(width=110).print(table)
    for name, facts in result.get("facts", {}).items():
        print(name, facts)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=sorted(CASES), default="smollm2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--trainers", type=int, default=1, help="trainer ranks")
    parser.add_argument(
        "--layout", choices=["tp", "ep"], default="tp", help="of the trainers: tensor or expert parallel"
    )
    parser.add_argument("--engines", type=int, default=1, help="tensor-parallel ranks of each engine")
    parser.add_argument("--replicas", type=int, default=1, help="engines")
    parser.add_argument("--fan-out", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--read-share", type=float, default=1.0, help="of the time, for staged reads")
    parser.add_argument(
        "--trainer-gpus",
        type=int,
        default=0,
        help="GPUs for trainers alone, fewer than there are; default all",
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the trainers' memory")
    parser.add_argument("--transport", help="by default cuda_ipc on CUDA, nixl on CPU")
    parser.add_argument("--modes", default="staged,inplace", help="by comma")
    parser.add_argument("--paths", help="reference paths to run beside ours, by comma; by default all")
    parser.add_argument("--runs", type=int, default=20, help="counted runs of each path, after warm-up")
    parser.add_argument("--slow-runs", type=int, help="the same for paths of seconds; by default as --runs")
    parser.add_argument("--json", type=Path, help="also write the result here, after every path")
    args = parser.parse_args()
    if not 0 <= args.trainer_gpus < num_gpus():
        parser.error(f"--trainer-gpus {args.trainer_gpus} leaves engines none of {num_gpus()} GPUs")
    return args


def main() -> None:
    """Run every path and print, and write, what came out."""
    args = parse_arguments()
    setup = Setup(
        case=args.case,
        device=args.device,
        transport=args.transport or ("cuda_ipc" if args.device == "cuda" else "nixl"),
        trainers=args.trainers,
        layout=args.layout,
        engines=args.engines,
        replicas=args.replicas,
        dtype=args.dtype,
        fan_out=args.fan_out,
        read_share=args.read_share,
        trainer_gpus=args.trainer_gpus,
    )
    available = dict(REFERENCES[args.device])
    if args.device == "cuda" and num_gpus() > 1:
        available |= REFERENCES["several GPUs"]
    wanted = list(available) if args.paths is None else [path for path in args.paths.split(",") if path]
    result: dict[str, Any] = {
        "case": args.case,
        "command": " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": versions(),
        "nbytes": num_bytes(args.case),
        "num_tensors": len(CASES[args.case].shapes()),
        "results": [],
        "facts": {},
    }
    with ray_cluster():
        for mode in filter(None, args.modes.split(",")):
            name = "ours" if mode == "staged" else f"ours_{mode}"
            measured, result["facts"][name] = measure_ours(setup, args.runs + WARM_UP, mode, name)
            for path, samples in measured.items():
                result["results"] += rows_of(path, samples)
            write(result, args.json)
        devices = setup.trainer_devices()[0], place_engine(setup)
        for path in wanted:
            console.print(path)
            runs = args.slow_runs if args.slow_runs and path in SLOW_PATHS else args.runs
            result["results"] += rows_of(path, available[path](args.case, runs + WARM_UP, devices))
            write(result, args.json)
    show(result)


def write(result: dict[str, Any], path: Path | None) -> None:
    """Write what is known so far, where it was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def place_engine(setup: Setup) -> str:
    """The device of the first engine rank, as a process that sees every GPU names it."""
    return setup.device if setup.device == "cpu" else f"cuda:{setup.engine_gpus(0)[0]}"


if __name__ == "__main__":
    main()
