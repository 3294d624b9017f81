"""A real `vllm serve --weight-sync rdt` beside a trainer: syncs under load, and what they cost.

    python benchmarks/vllm_server.py --json benchmarks/results/vllm-h100.json

The trainer holds a Hugging Face model with Qwen3-0.6B's shapes and random weights and goes to and fro between
two sets of them. A second, plain vLLM loads the first set from a checkpoint: its log-probabilities are what
ours must give after a sync of the same weights. Then syncs with requests in flight; with ``--sleep``, updates
of an engine that sleeps and wakes; and the same weights sent to the second vLLM by its own ``ipc`` backend.
Every fact is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import ray
import torch
from engine_server import find_port, run_server
from hf_trainer import HfTrainer
from sleeping import MODES, Sleeper, greatest_difference, measure_sleep, used_gpu_bytes
from sync import machine, ray_cluster, versions

from rdt_core import WeightSync

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

TIMEOUT_S = 240.0
WARM_UP = 5
BETWEEN_S = 0.05
"""Between two calls of another kind; between two syncs the trainer's step takes as long."""
PROMPT = [11, 523, 871, 77, 902, 4, 151, 621, 33, 18, 990, 444, 21, 7, 5, 123]
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "initializer_range": 0.05,
    "dtype": "bfloat16",
}
TINY = {**SHAPE, "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "dtype": "float32"}
ON_GPU = ["--kv-cache-memory-bytes", str(4 * 2**30)]
ON_CPU = ["--enforce-eager", "--dtype", "float32"]
ENV = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "OMP_NUM_THREADS": "1"}
DEV_ENV = {"VLLM_SERVER_DEV_MODE": "1"}
IPC_ENV = {**DEV_ENV, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
# Mode, KV cache, requests in flight, counted syncs.
CASES = (
    ("inplace", "keep", 8, 40),
    ("staged", "keep", 8, 40),
    ("staged", "recompute", 8, 100),
    ("inplace", "recompute", 8, 40),
    ("inplace", "recompute", 0, 40),
    ("staged", "recompute", 0, 40),
)


def vllm_server(
    folder: str, log: Path, *arguments: str, **env: str
) -> AbstractContextManager[tuple[str, int]]:
    """A server, on a GPU with its CUDA graphs, once it is ready; yields its URL and its process."""
    port = find_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "m", "--max-model-len", "1024"]
    is_gpu = torch.cuda.is_available()
    command += ["--max-num-seqs", "32", *(ON_GPU if is_gpu else ON_CPU), *arguments]
    env = {**ENV, **({} if is_gpu else CPU_ENV), **env}
    return run_server(command, port, ready="/health", log=log, env=env)


class Load:
    """Requests in flight, from threads of this process, until stopped. The first client's answers stream."""

    def __init__(self, url: str, num_clients: int) -> None:
        self._url, self._stop = url, threading.Event()
        self.done, self.failed = 0, 0
        self.gaps_s: list[float] = []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(client == 0,), daemon=True)
            for client in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, is_streaming: bool) -> None:  # noqa: FBT001  of a thread's arguments
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 128, "temperature": 0.8, "ignore_eos": True}
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    num_tokens = self._stream(client, body) if is_streaming else _post(client, body)
                except httpx.HTTPError:
                    num_tokens = 0
                with self._lock:
                    self.done += num_tokens == body["max_tokens"]
                    self.failed += num_tokens != body["max_tokens"]

    def _stream(self, client: httpx.Client, body: dict[str, Any]) -> int:
        last = None
        num_tokens = 0
        options = {"include_usage": True, "continuous_usage_stats": True}
        with client.stream(
            "POST", "/v1/completions", json={**body, "stream": True, "stream_options": options}
        ) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter()
                if last is not None:
                    self.gaps_s.append(now - last)
                last = now
                num_tokens = json.loads(line[len("data: ") :])["usage"]["completion_tokens"]
        return num_tokens

    def stop(self) -> None:
        """Let what is in flight end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def _post(client: httpx.Client, body: dict[str, Any]) -> int:
    answer = client.post("/v1/completions", json=body)
    return int(answer.json()["usage"]["completion_tokens"]) if answer.is_success else 0


def prompt_logprobs(url: str) -> list[float]:
    """The log-probability of every token of the prompt but the first."""
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False).json()
    rows = answer["choices"][0]["prompt_logprobs"][1:]
    return [row[str(token)]["logprob"] for row, token in zip(rows, PROMPT[1:], strict=True)]


def summarize(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of every phase in milliseconds."""
    return {phase: figures([sample[phase] for sample in samples]) for phase in samples[0]}


def figures(seconds: list[float]) -> dict[str, float]:
    """Median, least, most and the 99th percentile in milliseconds."""
    ms = sorted(1e3 * value for value in seconds)
    found = {"median_ms": statistics.median(ms), "min_ms": ms[0], "max_ms": ms[-1]}
    found["p99_ms"] = ms[int(0.99 * (len(ms) - 1))]
    return {**{name: round(value, 3) for name, value in found.items()}, "n": len(ms)}


def run_syncs(sync: WeightSync, trainer: Any, numbers: range, kv_cache: str) -> list[dict[str, float]]:
    """Sync every version, asked for while the trainer does its step, as in a training loop."""
    samples = []
    for version in numbers:
        published = trainer.publish.remote(version)
        report = sync.update(version=version, kv_cache=kv_cache, timeout_s=60.0)
        ended = time.perf_counter()
        publish_began, publish_ended = ray.get(published, timeout=TIMEOUT_S)
        samples.append(
            {
                "publish": publish_ended - publish_began,
                "prepare": report.prepare_s,
                "read": max(rank.prepare_s for rank in report.ranks),
                "commit_request": report.total_s - report.prepare_s - report.publish_wait_s,
                "commit": report.commit_s,
                "stall": report.stall_s,
                "from_publish": ended - publish_began,
            }
        )
    return samples


class Session:
    """One run: the servers, the trainer, and where facts go.

    Args:
        path: of the JSON file, written anew with every fact; None for none.
        deadline: by ``time.monotonic()``, after which no part is begun.
    """

    def __init__(self, path: Path | None, deadline: float) -> None:
        self._path, self._deadline = path, deadline
        self.result: dict[str, Any] = {"machine": machine(), "versions": versions(), "runs": {}}
        self._numbers = 1

    def note(self, name: str, value: Any, *, run: bool = False) -> None:
        """Keep a fact, print it and write it."""
        (self.result["runs"] if run else self.result)[name] = value
        print(name, json.dumps(value), flush=True)
        if self._path:
            self._path.write_text(json.dumps(self.result, indent=1) + "\n")

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Run one part; one that fails is noted and does not keep the next from running."""
        if time.monotonic() > self._deadline:
            self.note(f"not run: {name}", "no time was left")
            return
        try:
            work()
        except Exception:  # noqa: BLE001  whatever it is, the other parts are worth having
            self.note(f"failed: {name}", traceback.format_exc()[-1500:])

    def versions(self, count: int, *, odd: bool = False) -> range:
        """The next ``count`` versions, the first one odd if asked for."""
        first = self._numbers + (odd and self._numbers % 2 == 0)
        self._numbers = first + count
        return range(first, first + count)

    def compare_logprobs(self, url: str, plain: str, trainer: Any) -> None:
        """Before any sync, and after syncs of the checkpoint's weights, of others, and of its own."""
        loaded = prompt_logprobs(plain)
        found = {
            "plain_twice": greatest_difference(loaded, prompt_logprobs(plain)),
            "before": greatest_difference(loaded, prompt_logprobs(url)),
        }
        with WeightSync.connect("vllm", engines=[url], timeout_s=TIMEOUT_S) as sync:
            self.note("connected", next(iter(sync.engines.values())))
            for version in self.versions(3, odd=True):
                run_syncs(sync, trainer, range(version, version + 1), "recompute")
                name = "after the checkpoint's weights" if version % 2 else "after other weights"
                found[f"{name}, version {version}"] = greatest_difference(loaded, prompt_logprobs(url))
        self.note("logprob_difference_from_a_plain_vllm", found)

    def measure_case(self, url: str, trainer: Any, case: tuple[str, str, int, int]) -> None:
        """Syncs of one kind."""
        mode, kv_cache, clients, count = case
        with WeightSync.connect("vllm", engines=[url], mode=mode, timeout_s=TIMEOUT_S) as sync:
            load = Load(url, clients)
            run_syncs(sync, trainer, self.versions(WARM_UP), kv_cache)
            used = used_gpu_bytes()
            load.gaps_s.clear()
            samples = run_syncs(sync, trainer, self.versions(count), kv_cache)
            grown = used_gpu_bytes() - used
            load.stop()
            facts: dict[str, Any] = {
                "requests_done": load.done,
                "requests_failed": load.failed,
                "gpu_growth_bytes": grown,
                "bytes_equal": sync.verify().bytes_equal,
                "phases": summarize(samples),
            }
            if load.gaps_s:
                facts["gap_between_tokens"] = figures(load.gaps_s)
        self.note(f"{mode}, {kv_cache}, {clients} requests in flight", facts, run=True)

    def measure_sleep_level(self, url: str, trainer: Any, mode: str, level: int) -> None:
        """A sleep of one level. On a CPU the engine goes through all of it and keeps its memory."""

        def post(path: str) -> None:
            httpx.post(url + path, timeout=TIMEOUT_S, trust_env=False).raise_for_status()

        engine = Sleeper(
            sleep=lambda: post(f"/sleep?level={level}"),
            wake_weights=lambda: post("/wake_up?tags=weights"),
            wake_rest=lambda: post("/wake_up?tags=kv_cache"),
            answer=lambda: prompt_logprobs(url),
        )
        with WeightSync.connect("vllm", engines=[url], mode=mode, timeout_s=TIMEOUT_S) as sync:
            facts = measure_sleep(sync, trainer, self.versions(3, odd=True), engine)
        self.note(f"sleep, {mode}, level {level}", facts, run=True)

    def measure_messages(self, url: str, clients: int) -> None:
        """What one message to the engine's core costs, and the gaps between tokens without a sync."""
        load = Load(url, clients)
        took: list[float] = []
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            for number in range(WARM_UP + 50):
                began = time.perf_counter()
                client.get("/is_paused").raise_for_status()
                took += [time.perf_counter() - began] if number >= WARM_UP else []
                time.sleep(BETWEEN_S / 2)
        load.stop()
        found = {"is_paused": figures(took), **({"gap": figures(load.gaps_s)} if load.gaps_s else {})}
        self.note(f"one message to the core, {clients} requests in flight", found)

    def measure_ipc(self, plain: str, trainer: Any, clients: int) -> None:
        """The same weights by vLLM's own backend."""
        load = Load(plain, clients)
        samples = []
        for number, version in enumerate(self.versions(WARM_UP + 25)):
            sample = ray.get(trainer.send_by_ipc.remote(plain, version), timeout=TIMEOUT_S)
            samples += [sample] if number >= WARM_UP else []
            time.sleep(BETWEEN_S)
        load.stop()
        facts = {"requests_done": load.done, "requests_failed": load.failed, "phases": summarize(samples)}
        if load.gaps_s:
            facts["gap_between_tokens"] = figures(load.gaps_s)
        self.note(f"vLLM's own ipc backend, keep, {clients} requests in flight", facts, run=True)


def parse_cases(text: str) -> tuple[tuple[str, str, int, int], ...]:
    """The cases that an argument names, in its order."""
    if text in ("all", "none"):
        return CASES if text == "all" else ()
    try:
        return tuple(CASES[int(index)] for index in text.split(","))
    except (ValueError, IndexError):
        reason = f"{text!r} is neither all, none nor indices below {len(CASES)} by comma"
        raise argparse.ArgumentTypeError(reason) from None


def start(stack: ExitStack, server: AbstractContextManager[tuple[str, int]]) -> str | None:
    """A server's URL; None, with its log printed, when it does not start."""
    try:
        return stack.enter_context(server)[0]
    except SystemExit as error:
        print(error, flush=True)
        return None


def main() -> None:
    """Start, sync, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, default=Path("/tmp"))  # noqa: S108  of a benchmark
    parser.add_argument("--serve", default="", help='more for both servers, "--tensor-parallel-size 2"')
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which no part is begun")
    parser.add_argument("--cases", type=parse_cases, default="all", help='indices by comma, "all" or "none"')
    parser.add_argument("--sleep", action="store_true", help="also have the engine sleep, at both levels")
    args = parser.parse_args()
    session = Session(args.json, time.monotonic() + args.seconds)
    is_gpu = torch.cuda.is_available()
    with ray_cluster(), tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        shape, device = (SHAPE, "cuda") if is_gpu else (TINY, "cpu")
        trainer = ray.remote(HfTrainer).options(num_cpus=0).remote(folder, shape, device)
        ray.get(trainer.attach.remote("vllm"), timeout=TIMEOUT_S)
        started = time.perf_counter()
        ipc = ("--weight-transfer-config", '{"backend":"ipc"}') if is_gpu else ()
        flags = ["--weight-sync", "rdt", "--load-format", "dummy"]
        # vLLM refuses this one on a CPU.
        flags += ["--enable-sleep-mode"] if args.sleep and is_gpu else []
        env = DEV_ENV if args.sleep else {}
        servers = (
            vllm_server(folder, args.logs / "vllm-rdt.log", *flags, *shlex.split(args.serve), **env),
            vllm_server(folder, args.logs / "vllm-plain.log", *ipc, *shlex.split(args.serve), **IPC_ENV),
        )
        with ThreadPoolExecutor() as pool:
            url, plain = pool.map(lambda server: start(stack, server), servers)
        session.note("serve", args.serve)
        session.note("start_s", round(time.perf_counter() - started, 1))
        if url is None:
            raise SystemExit("the server with --weight-sync rdt did not start")
        if plain is not None:
            session.part("log-probabilities", lambda: session.compare_logprobs(url, plain, trainer))
        for case in args.cases:
            session.part(str(case), lambda case=case: session.measure_case(url, trainer, case))  # type: ignore[misc]  # bound now
        for mode, level in itertools.product(MODES, (1, 2) if args.sleep else ()):
            session.part(
                f"sleep, {mode}, level {level}",
                lambda mode=mode, level=level: session.measure_sleep_level(url, trainer, mode, level),  # type: ignore[misc]  # bound now
            )
        for clients in (8, 0):
            session.part("messages", lambda clients=clients: session.measure_messages(url, clients))  # type: ignore[misc]  # bound now
        if plain is not None and is_gpu:
            for clients in (8, 0):
                session.part("ipc", lambda clients=clients: session.measure_ipc(plain, trainer, clients))  # type: ignore[misc]  # bound now
        ray.get(trainer.close.remote(), timeout=TIMEOUT_S)


if __name__ == "__main__":
    main()
