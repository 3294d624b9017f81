"""A real `sglang.launch_server --weight-sync rdt` beside a trainer: what a read costs those who are served.

    python benchmarks/sglang_server.py --json benchmarks/results/sglang-cpu.json

Requests stream all the time. In turns of a few seconds nothing else happens, or the engine reads versions one
after the other without a pause, and the tokens of every turn are counted: neighbours are compared, so that
what else the machine does falls on both. `paced` turns read one version a period, as a trainer does whose
steps take that long. Then whole syncs, for the time that requests in flight stand. Last, reads without a
pause again, by drivers that connected with a `read_share` each, and with `--sleep`, updates of an engine that
sleeps and wakes. `--only-syncs` leaves out all turns.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import ray
import torch
from engine_server import find_port, run_server
from hf_trainer import HfTrainer
from sleeping import MODES, Sleeper, measure_sleep
from sync import machine, ray_cluster, versions

from rdt_core import WeightSync
from rdt_core.engine_http import EngineHttp

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

TIMEOUT_S = 600.0
IDLE_TIMEOUT_S = 20.0
PROMPT = [11, 523, 871, 77, 902, 4, 151, 621, 33, 18, 990, 444, 21, 7, 5, 123]
# The shapes of SmolLM2-135M, as a Qwen3.
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "initializer_range": 0.05,
    "dtype": "float32",
}
ON_CPU = [
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--cuda-graph-backend-decode", "disabled"),
    *("--cuda-graph-backend-prefill", "disabled", "--disable-custom-all-reduce", "--skip-server-warmup"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "16384", "--dtype", "float32"),
]
# The shapes of Qwen3-0.6B.
GPU_SHAPE = {
    **SHAPE,
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
}
ON_GPU = [
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--mem-fraction-static", "0.3", "--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "16"),
]
CPU_ENV = {"OMP_NUM_THREADS": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0|1", "TORCHDYNAMO_DISABLE": "1"}


def sglang_server(folder: str, log: Path, *arguments: str) -> AbstractContextManager[tuple[str, int]]:
    """A server, once it is ready; yields its URL and its process."""
    port = find_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", folder, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--random-seed", "1", *arguments]
    is_cpu = not torch.cuda.is_available()
    command += ON_CPU if is_cpu else ON_GPU
    env = {"HF_HUB_OFFLINE": "1", **(CPU_ENV if is_cpu else {})}
    return run_server(command, port, ready="/model_info", log=log, env=env)


class Load:
    """Requests that stream from threads of this process until stopped; counts tokens as they arrive."""

    def __init__(self, url: str, num_clients: int) -> None:
        self._url, self._stop = url, threading.Event()
        self.tokens = [0] * num_clients
        self.num_failed = 0
        self.gaps_s: list[float] = []
        self._threads = [
            threading.Thread(target=self._ask, args=(client,), daemon=True) for client in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, client: int) -> None:
        sampling = {"max_new_tokens": 512, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": [client, *PROMPT], "sampling_params": sampling, "stream": True}
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S, trust_env=False) as http:
            while not self._stop.is_set():
                last = None
                with http.stream("POST", "/generate", json=body) as answer:
                    self.num_failed += not answer.is_success
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            self.tokens[client] += 1
                            now = time.perf_counter()
                            if last is not None:
                                self.gaps_s.append(now - last)
                            last = now
                        if self._stop.is_set():
                            break

    def stop(self) -> None:
        """Leave the requests in flight."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def scheduler_cpu_s(server_pid: int) -> float:
    """Processor time of the thread that runs the model, from when its process began."""
    ticks = os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            # Field 5 is the process group, which the server's processes share.
            if "sglang::schedul" in name and int(rest.split()[2]) == server_pid:
                pid = stat.parent.name
                fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / ticks
    raise SystemExit("found no scheduler of the server")


def measure_turn(load: Load, server_pid: int, seconds: float, work: Callable[[float], int]) -> dict[str, Any]:
    """One turn: tokens and processor seconds while ``work`` runs until its deadline; it returns a count."""
    tokens, cpu_s, started = sum(load.tokens), scheduler_cpu_s(server_pid), time.perf_counter()
    num_reads = work(time.monotonic() + seconds)
    elapsed = time.perf_counter() - started
    num_tokens = sum(load.tokens) - tokens
    return {
        "seconds": elapsed,
        "tokens_per_s": num_tokens / elapsed,
        "scheduler_cpu_ms_per_token": 1e3 * (scheduler_cpu_s(server_pid) - cpu_s) / max(1, num_tokens),
        "reads": num_reads,
    }


def rest(deadline: float) -> int:
    """Nothing but waiting: a turn to compare with."""
    time.sleep(max(0.0, deadline - time.monotonic()))  # the length of a turn
    return 0


def read_again(engine: EngineHttp, version: int, read_s: list[float], period_s: float) -> Callable[..., int]:
    """Has the engine read a version again and again, once a period; 0 for without a pause."""

    def work(deadline: float) -> int:
        count = 0
        while time.monotonic() < deadline:
            started = time.monotonic()
            engine.call("prepare", {"version": version, "timeout_s": 60.0}, timeout_s=120.0)
            read_s.append(time.monotonic() - started)
            count += 1
            rest(min(deadline, started + period_s))
        return count

    return work


def compare(
    load: Load, server_pid: int, pairs: int, seconds: float, work: Callable[[float], int]
) -> dict[str, Any]:
    """Turns with and without ``work``, in changing order; ratios of neighbours."""
    ratios, cpu_ratios = [], []
    turns: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    for pair in range(pairs):
        order = ("without", "with") if pair % 2 else ("with", "without")
        found = {
            name: measure_turn(load, server_pid, seconds, work if name == "with" else rest) for name in order
        }
        for name, turn in found.items():
            turns[name].append(turn)
        ratios.append(found["with"]["tokens_per_s"] / found["without"]["tokens_per_s"])
        cpu = (turn["scheduler_cpu_ms_per_token"] for turn in (found["with"], found["without"]))
        cpu_ratios.append(next(cpu) / max(1e-9, next(cpu)))
    sums = {name: sum(turn["tokens_per_s"] for turn in taken) for name, taken in turns.items()}
    return {
        "pairs": pairs,
        "turn_s": seconds,
        "reads": sum(turn["reads"] for turn in turns["with"]),
        **{
            f"tokens_per_s_{name}": round(statistics.median(turn["tokens_per_s"] for turn in taken), 2)
            for name, taken in turns.items()
        },
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_of_sums": round(sums["with"] / sums["without"], 4),
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)] if pairs > 1 else [],
        "scheduler_cpu_ratio_median": round(statistics.median(cpu_ratios), 4),
    }


def measure_syncs(
    sync: WeightSync, trainer: Any, numbers: range, kv_cache: str, mode: str | None = None
) -> dict[str, Any]:
    """Whole syncs while requests are in flight, asked for while the trainer does its step."""
    samples: dict[str, list[float]] = {
        phase: [] for phase in ("publish", "prepare", "read", "commit", "drain", "stall", "from_publish")
    }
    (url,) = sync.engines
    for version in numbers:
        published = trainer.publish.remote(version)
        report = sync.update(version=version, kv_cache=kv_cache, mode=mode, timeout_s=120.0)
        ended = time.perf_counter()
        publish_began, publish_ended = ray.get(published, timeout=TIMEOUT_S)
        samples["publish"].append(publish_ended - publish_began)
        samples["from_publish"].append(ended - publish_began)
        samples["read"].append(max(rank.prepare_s for rank in report.ranks))
        samples["drain"].append(drain_s(url))
        for phase in ("prepare", "commit", "stall"):
            samples[phase].append(getattr(report, f"{phase}_s"))
    return {phase: summarize(values) for phase, values in samples.items()}


def drain_s(url: str) -> float:
    """The part of the last stall before the copy, of the slowest rank."""
    with contextlib.closing(EngineHttp(url)) as engine:
        ranks = engine.call("status", {}, timeout_s=TIMEOUT_S)["ranks"]
    return max(float(rank["last_commit"]["drain_s"]) for rank in ranks)


def summarize(seconds: list[float]) -> dict[str, float]:
    """Median, least and most in milliseconds."""
    ms = [1e3 * value for value in seconds]
    figures = {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)}
    return {**{name: round(value, 2) for name, value in figures.items()}, "n": len(ms)}


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, default=Path("/tmp"))  # noqa: S108  of a benchmark
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--turn", type=float, default=5.0, help="seconds of a turn")
    parser.add_argument("--period", type=float, default=2.5, help="seconds from read to read in paced turns")
    parser.add_argument("--syncs", type=int, default=10)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--modes", default="staged", help="of the syncs beside requests, by comma")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-shares", action="store_true", help="leave out all but the last turns")
    only.add_argument("--only-syncs", action="store_true", help="leave out all turns")
    parser.add_argument("--shares", default="1,0.5,0.25,0.1", help="read_share of the last turns, by comma")
    parser.add_argument("--serve", default="", help='more for the server, "--tp-size 2"')
    parser.add_argument("--sleep", action="store_true", help="also have the engine sleep, in both modes")
    args = parser.parse_args()
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": {**versions(), "sglang": versions_of_sglang()},
        "shape": GPU_SHAPE if torch.cuda.is_available() else SHAPE,
        "clients": args.clients,
        "serve": args.serve,
    }
    try:
        run(result, args)
    finally:
        note(result, "load_average_after", os.getloadavg())
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


def run(result: dict[str, Any], args: argparse.Namespace) -> None:
    """All that is measured, with the trainer and the server for it."""
    is_gpu = torch.cuda.is_available()
    flags = ["--weight-sync", "rdt", *shlex.split(args.serve)]
    # On a CPU there is nothing that it could save: the server goes through all of a sleep without it.
    flags += ["--enable-memory-saver"] if args.sleep and is_gpu else []
    with ray_cluster(), tempfile.TemporaryDirectory() as folder:
        device = "cuda" if is_gpu else "cpu"
        trainer = ray.remote(HfTrainer).options(num_cpus=0).remote(folder, result["shape"], device)
        ray.get(trainer.attach.remote("sglang"), timeout=TIMEOUT_S)
        started = time.perf_counter()
        with sglang_server(folder, args.logs / "sglang-rdt.log", *flags) as (url, pid):
            note(result, "start_s", round(time.perf_counter() - started, 1))
            with WeightSync.connect("sglang", engines=[url], timeout_s=120.0) as sync:
                connected = next(iter(sync.engines.values()))[0]
                note(result, "connected", {k: connected[k] for k in ("connect_s", "read_nbytes", "trainers")})
                if args.only_shares:
                    measure_syncs(sync, trainer, range(1, 3), "recompute")
                else:
                    measure(result, sync, trainer, url, pid, args)
                note(result, "bytes_equal", sync.verify(timeout_s=TIMEOUT_S).bytes_equal)
                version = sync.version + 1
            if not args.only_syncs:
                ray.get(trainer.publish.remote(version), timeout=TIMEOUT_S)
                measure_shares(result, version, url, pid, args)
            if args.sleep:
                measure_sleeps(result, version + 1, trainer, url)
        ray.get(trainer.close.remote(), timeout=TIMEOUT_S)


def measure(
    result: dict[str, Any], sync: WeightSync, trainer: Any, url: str, pid: int, args: argparse.Namespace
) -> None:
    """Reads beside requests, then whole syncs beside requests."""
    idle = range(1, 1 + args.syncs)
    note(result, "syncs: nothing in flight", measure_syncs(sync, trainer, idle, "recompute"))
    versions_left = itertools.count(idle.stop)
    load = Load(url, args.clients)
    warm = next(versions_left)
    measure_syncs(sync, trainer, range(warm, warm + 1), "recompute")
    if not args.only_syncs:
        version = next(versions_left)
        ray.get(trainer.publish.remote(version), timeout=TIMEOUT_S)
        measure_reads(result, version, load, url, pid, args)
    for mode, kv_cache in itertools.product(args.modes.split(","), ("recompute", "keep")):
        # The first connects the engine in that mode.
        warm = next(versions_left)
        measure_syncs(sync, trainer, range(warm, warm + 1), kv_cache, mode)
        first = next(versions_left)
        versions_left = itertools.count(first + args.syncs)
        load.gaps_s.clear()
        phases = measure_syncs(sync, trainer, range(first, first + args.syncs), kv_cache, mode)
        note(result, f"syncs: {mode}, {kv_cache}", {**phases, "gap_between_tokens": summarize(load.gaps_s)})
    note(result, "requests_failed", load.num_failed)
    load.stop()


def measure_reads(
    result: dict[str, Any], version: int, load: Load, url: str, pid: int, args: argparse.Namespace
) -> None:
    """Reads of one version beside requests, at different paces."""
    engine = EngineHttp(url)
    for name, period_s in (("nothing", None), ("paced", args.period), ("without a pause", 0.0)):
        read_s: list[float] = []
        work = rest if period_s is None else read_again(engine, version, read_s, period_s)
        found = compare(load, pid, args.pairs, args.turn, work)
        note(result, f"reads: {name}", {**found, **({"read": summarize(read_s)} if read_s else {})})


def measure_shares(
    result: dict[str, Any], version: int, url: str, pid: int, args: argparse.Namespace
) -> None:
    """Reads of one version without a pause, as drivers with different shares have the engine do them."""
    load = Load(url, args.clients)
    for share in map(float, args.shares.split(",")):
        with WeightSync.connect("sglang", engines=[url], read_share=share, timeout_s=120.0):
            read_s: list[float] = []
            work = read_again(EngineHttp(url), version, read_s, 0.0)
            found = compare(load, pid, args.pairs, args.turn, work)
            note(result, f"reads: read_share {share:g}", {**found, "read": summarize(read_s)})
    note(result, "requests_failed_beside_shares", load.num_failed)
    load.stop()


def measure_sleeps(result: dict[str, Any], version: int, trainer: Any, url: str) -> None:
    """A sleep in each mode.

    Args:
        result: gets the facts.
        version: that may be published next.
        trainer: publishes.
        url: of a server that gets no new requests.
    """

    def post(route: str, *tags: str) -> None:
        body = {"tags": tags}
        httpx.post(url + route, json=body, timeout=TIMEOUT_S, trust_env=False).raise_for_status()

    def sleep() -> None:
        wait_until_idle(url)
        post("/release_memory_occupation", "weights", "kv_cache")

    engine = Sleeper(
        sleep=sleep,
        wake_weights=lambda: post("/resume_memory_occupation", "weights"),
        wake_rest=lambda: post("/resume_memory_occupation", "kv_cache"),
        answer=lambda: prompt_logprobs(url),
    )
    wait_until_idle(url)
    first = version + (version % 2 == 0)
    for mode in MODES:
        with WeightSync.connect("sglang", engines=[url], mode=mode, timeout_s=120.0) as sync:
            facts = measure_sleep(sync, trainer, range(first, first + 3), engine)
        note(result, f"sleep: {mode}", facts)
        first += 4


def wait_until_idle(url: str) -> None:
    """Until no request is in flight: a scheduler that is to release memory before that ends.

    ``/flush_cache`` is refused until then; what it drops does not outlive the release either.

    Source: managers/scheduler_components/weight_updater.py, release_memory_occupation (0.5.23).

    Raises:
        RuntimeError: there still is one after 20 seconds.
    """
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while not httpx.post(f"{url}/flush_cache", timeout=TIMEOUT_S, trust_env=False).is_success:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{url} is busy after {IDLE_TIMEOUT_S:.0f} s without new requests. See its log."
            )
        time.sleep(0.1)  # between two questions: SGLang tells nobody when its last request ends


def prompt_logprobs(url: str) -> list[float]:
    """The log-probability of every token of the prompt but the first."""
    sampling = {"max_new_tokens": 1, "temperature": 0}
    asked = {"return_logprob": True, "logprob_start_len": 0}
    body = {"input_ids": PROMPT, "sampling_params": sampling, **asked}
    answer = httpx.post(f"{url}/generate", json=body, timeout=TIMEOUT_S, trust_env=False)
    rows = answer.raise_for_status().json()["meta_info"]["input_token_logprobs"][1:]
    return [float(logprob) for logprob, *_ in rows]


def versions_of_sglang() -> str:
    """The engine's version."""
    import importlib.metadata  # noqa: PLC0415  asked once

    return importlib.metadata.version("sglang")


def note(into: dict[str, Any], name: str, value: Any) -> None:
    """Keep a fact and print it at once, so that a run that ends early has told what it knew."""
    into[name] = value
    print(name, json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
