"""How long a sync takes, beside the ways one would do without: one run, one table, one JSON file.

    python benchmarks/sync.py --case smollm2 --device cpu

Paths: ``copy_in_process`` (the limit: the same bytes from memory to memory in one process), ``ours``
(trainer, engine and driver in three processes), ``ray_plasma`` (numpy through Ray's object store), ``gloo``
(broadcast), ``safetensors`` (through a file).
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import ray
import torch
from cases import CASES
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rdt_core import LocalShard, LocalShards, Region, TensorSpec, WeightPublisher, WeightSync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT_S = 120.0
WARM_UP = 2
HERE = Path(__file__).parent
Sample = dict[str, float]
console = Console(stderr=True)


def tensors_of(case: str) -> dict[str, torch.Tensor]:
    """Random bf16 tensors of a case."""
    return {name: torch.randn(shape).to(torch.bfloat16) for name, shape in CASES[case].shapes().items()}


class Trainer:
    """One trainer rank that holds the whole model; an actor of its own process."""

    def __init__(self, case: str) -> None:
        self._tensors = tensors_of(case)
        self._publisher: WeightPublisher | None = None

    def attach(self, group: str) -> None:
        """Offer every tensor."""
        shards = tuple(
            LocalShard(
                spec=TensorSpec(name, tuple(data.shape), "bfloat16"),
                region=Region.whole(tuple(data.shape)),
                data=data,
                owner=name,
            )
            for name, data in self._tensors.items()
        )

        def locate() -> tuple[int, ...]:
            return tuple(data.data_ptr() for data in self._tensors.values())

        local = LocalShards(rank=0, world_size=1, shards=shards, locate=locate)
        self._publisher = WeightPublisher.attach(group, local)

    def step_and_publish(self, version: int) -> float:
        """Change every tensor and publish; returns the seconds that ``publish`` took."""
        if self._publisher is None:
            raise RuntimeError("attach first")
        for data in self._tensors.values():
            data.add_(0.01)
        started = time.perf_counter()
        self._publisher.publish(version)
        return time.perf_counter() - started

    def rss_bytes(self) -> int:
        """Resident memory of this process."""
        return int(psutil.Process().memory_info().rss)

    def put_in_plasma(self) -> tuple[float, list[ray.ObjectRef[Any]]]:
        """Put every tensor as a numpy array; returns when it began, by the system clock."""
        started = time.time()
        return started, [ray.put(data.view(torch.int16).numpy()) for data in self._tensors.values()]


class PlasmaReader:
    """Gets numpy arrays and copies them into tensors of its own."""

    def __init__(self, case: str) -> None:
        self._tensors = tensors_of(case)

    def read(self, refs: list[ray.ObjectRef[Any]]) -> float:
        """Get and copy; returns when it ended, by the system clock."""
        for data, array in zip(self._tensors.values(), ray.get(refs, timeout=TIMEOUT_S), strict=True):
            data.view(torch.int16).numpy()[...] = array
        return time.time()


def start(cls: type, case: str) -> Any:
    """An actor that takes no slot of the cluster."""
    return ray.remote(cls).options(num_cpus=0).remote(case)


def measure_copy(case: str, runs: int) -> list[Sample]:
    """The limit: every tensor copied once, inside one process."""
    sources = tensors_of(case)
    targets = {name: torch.zeros_like(data) for name, data in sources.items()}
    samples = []
    for _ in range(runs):
        started = time.perf_counter()
        for name, target in targets.items():
            target.copy_(sources[name])
        samples.append({"end_to_end": time.perf_counter() - started})
    return samples


def measure_ours(case: str, runs: int) -> tuple[list[Sample], dict[str, float]]:
    """Publish, prepare, commit, as the driver sees them; also how far both sides' memory grew."""
    trainer = start(Trainer, case)
    ray.get(trainer.attach.remote("benchmark"), timeout=TIMEOUT_S)
    samples = []
    with engine_process(case) as url, WeightSync.connect("benchmark", engines=[url]) as sync:
        landing = sum(rank["landing_nbytes"] for ranks in sync.engines.values() for rank in ranks)
        before: tuple[int, int] | None = None
        for version in range(1, runs + 1):
            publish_s = ray.get(trainer.step_and_publish.remote(version), timeout=TIMEOUT_S)
            report = sync.update(version=version)
            if version == WARM_UP:
                before = rss_of(trainer, url)
            samples.append(
                {
                    "publish": publish_s,
                    "prepare": report.ranks[0].prepare_s,
                    "commit": report.commit_s,
                    "stall": report.stall_s,
                    "end_to_end": publish_s + report.total_s,
                }
            )
        after = rss_of(trainer, url)
        if not sync.verify().bytes_equal:
            raise SystemExit("the engine's bytes differ from the trainer's")
    ray.kill(trainer)
    first = before or after
    memory = {
        "trainer_rss_growth_percent": 100 * (after[0] - first[0]) / first[0],
        "engine_rss_growth_percent": 100 * (after[1] - first[1]) / first[1],
        "landing_bytes": float(landing),
        "syncs": float(runs),
    }
    return samples, memory


def rss_of(trainer: Any, url: str) -> tuple[int, int]:
    """Resident bytes of the trainer and the engine process."""
    engine = httpx.get(f"{url}/rss", timeout=TIMEOUT_S).json()["rss_bytes"]
    return ray.get(trainer.rss_bytes.remote(), timeout=TIMEOUT_S), engine


def measure_plasma(case: str, runs: int) -> list[Sample]:
    """numpy arrays through Ray's object store, put on one side, got and copied on the other."""
    trainer, reader = start(Trainer, case), start(PlasmaReader, case)
    samples = []
    for _ in range(runs):
        started, refs = ray.get(trainer.put_in_plasma.remote(), timeout=TIMEOUT_S)
        ended = ray.get(reader.read.remote(refs), timeout=TIMEOUT_S)
        samples.append({"end_to_end": ended - started})
    ray.kill(trainer)
    ray.kill(reader)
    return samples


def measure_gloo(case: str, runs: int) -> list[Sample]:
    """``torch.distributed.broadcast`` of every tensor between two processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(HERE / "gloo.py"),
            "--case",
            case,
            "--runs",
            str(runs),
            "--folder",
            folder,
        ]
        reader = subprocess.Popen([*command, "--rank", "1"])
        try:
            done = subprocess.run(
                [*command, "--rank", "0"], capture_output=True, text=True, timeout=2 * TIMEOUT_S, check=True
            )
        finally:
            reader.kill()
            reader.wait(TIMEOUT_S)
    return [{"end_to_end": seconds} for seconds in json.loads(done.stdout.splitlines()[-1])]


def measure_safetensors(case: str, runs: int) -> list[Sample]:
    """Save to a file, load it, copy into parameters."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    sources = tensors_of(case)
    targets = {name: torch.zeros_like(data) for name, data in sources.items()}
    samples = []
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        for _ in range(runs):
            started = time.perf_counter()
            save_file(sources, f"{folder}/model.safetensors")
            for name, data in load_file(f"{folder}/model.safetensors").items():
                targets[name].copy_(data)
            samples.append({"end_to_end": time.perf_counter() - started})
    return samples


class engine_process:  # noqa: N801  reads as a function where it is used
    """An engine process on a free port, as a context manager that yields its URL."""

    def __init__(self, case: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(HERE / "engine_process.py"), "--case", case, "--port", str(port)]
        self._process = subprocess.Popen(command)

    def __enter__(self) -> str:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                httpx.get(f"{self._url}/rss", timeout=5)
            except httpx.HTTPError:
                time.sleep(0.1)
            else:
                return self._url
        self.__exit__()
        raise SystemExit("the engine process did not start")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(TIMEOUT_S)


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
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "ray", "nixl", "safetensors")}
    return {"python": platform.python_version(), "rdt-core": importlib.metadata.version("rdt-core"), **found}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    limit = next(r["median_ms"] for r in result["results"] if r["path"] == "copy_in_process")
    table = Table(
        title=f"{result['case']}: {result['nbytes'] / 1e6:.0f} MB in {result['num_tensors']} tensors"
    )
    for column in ("path", "phase", "median ms", "min", "max", "x copy", "GB/s"):
        table.add_column(column, justify="left" if column in ("path", "phase") else "right")
    for row in result["results"]:
        median = row["median_ms"]
        moves = row["phase"] in ("end_to_end", "prepare", "commit")
        table.add_row(
            row["path"],
            row["phase"],
            f"{median:.2f}",
            f"{row['min_ms']:.2f}",
            f"{row['max_ms']:.2f}",
            f"{median / limit:.2f}",
            f"{result['nbytes'] / median / 1e6:.2f}" if moves else "",
        )
    Console().print(table)
    if "memory" in result:
        Console().print(result["memory"])


def main() -> None:
    """Run every path and print, and write, what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=sorted(CASES), default="smollm2")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--runs", type=int, default=20, help="counted runs of each path, after warm-up")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    runs = args.runs + WARM_UP
    shapes = CASES[args.case].shapes()
    result: dict[str, Any] = {
        "case": args.case,
        "machine": machine(),
        "versions": versions(),
        "nbytes": sum(2 * torch.Size(shape).numel() for shape in shapes.values()),
        "num_tensors": len(shapes),
        "results": [],
    }
    others: dict[str, Callable[[str, int], list[Sample]]] = {
        "ray_plasma": measure_plasma,
        "gloo": measure_gloo,
        "safetensors": measure_safetensors,
    }
    with tempfile.TemporaryDirectory(prefix="rdt", dir="/tmp") as temp_dir:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            namespace="rdt",
            object_store_memory=4 * 2**30,
            _temp_dir=temp_dir,
        )
        try:
            result["results"] += rows_of("copy_in_process", measure_copy(args.case, runs))
            samples, result["memory"] = measure_ours(args.case, runs)
            result["results"] += rows_of("ours", samples)
            for path in track(others, description="other paths", console=console):
                result["results"] += rows_of(path, others[path](args.case, runs))
        finally:
            ray.shutdown()
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
