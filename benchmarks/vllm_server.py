"""A real `vllm serve --weight-sync rdt` beside a trainer on one GPU: syncs under load, and what they cost.

    python benchmarks/vllm_server.py --json benchmarks/results/vllm-h100.json

The trainer holds a Hugging Face model with Qwen3-0.6B's shapes and random weights and goes to and fro between
two sets of them. Requests are in flight all the time. At the end the served log-probabilities are compared
with those of a second, plain vLLM that loaded the same weights from a checkpoint.
"""

from __future__ import annotations

import argparse
import json
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
from sync import machine, ray_cluster, versions

from rdt_core import WeightSync

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

TIMEOUT_S = 240.0
WARM_UP = 5
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


def vllm_server(folder: str, log: Path, *arguments: str) -> AbstractContextManager[tuple[str, int]]:
    """A server with CUDA graphs, once it is ready; yields its URL and its process."""
    port = find_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "m", "--max-model-len", "1024"]
    command += ["--gpu-memory-utilization", "0.3", "--max-num-seqs", "32", *arguments]
    env = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return run_server(command, port, ready="/health", log=log, env=env)


class Load:
    """Requests in flight, from threads of this process, until stopped."""

    def __init__(self, url: str, num_clients: int) -> None:
        self._url, self._stop = url, threading.Event()
        self.done, self.failed, self.tokens = 0, 0, 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 128, "temperature": 0.8, "ignore_eos": True}
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False) as client:
            while not self._stop.is_set():
                answer = client.post("/v1/completions", json=body)
                with self._lock:
                    is_whole = (
                        answer.is_success
                        and answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
                    )
                    self.done += is_whole
                    self.failed += not is_whole
                    self.tokens += answer.json()["usage"]["completion_tokens"] if is_whole else 0

    def stop(self) -> None:
        """Let what is in flight end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def prompt_logprobs(url: str) -> list[float]:
    """The log-probability of every token of the prompt but the first."""
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    rows = answer["choices"][0]["prompt_logprobs"][1:]
    return [row[str(token)]["logprob"] for row, token in zip(rows, PROMPT[1:], strict=True)]


def used_gpu_bytes() -> int:
    """Memory in use on the GPU, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def summarize(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of every phase in milliseconds."""
    return {
        phase: {
            "median_ms": round(1e3 * statistics.median(s[phase] for s in samples), 3),
            "min_ms": round(1e3 * min(s[phase] for s in samples), 3),
            "max_ms": round(1e3 * max(s[phase] for s in samples), 3),
            "n": len(samples),
        }
        for phase in samples[0]
    }


def run_syncs(sync: WeightSync, trainer: Any, numbers: range, kv_cache: str) -> list[dict[str, float]]:
    """Publish and sync every version."""
    samples = []
    for version in numbers:
        publish_s = float(ray.get(trainer.publish.remote(version), timeout=TIMEOUT_S))
        began = time.perf_counter()
        report = sync.update(version=version, kv_cache=kv_cache)
        samples.append(
            {
                "publish": publish_s,
                "prepare": report.prepare_s,
                "read": report.ranks[0].prepare_s,
                "commit": report.commit_s,
                "stall": report.stall_s,
                "end_to_end": publish_s + time.perf_counter() - began,
            }
        )
    return samples


def main() -> None:
    """Start, sync, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, default=Path("/tmp"))  # noqa: S108  of a benchmark
    parser.add_argument("--syncs", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "runs": {}}
    with ray_cluster(), tempfile.TemporaryDirectory() as folder:
        trainer = ray.remote(HfTrainer).options(num_cpus=0).remote(folder, SHAPE, "cuda")
        ray.get(trainer.attach.remote("vllm"), timeout=TIMEOUT_S)
        started = time.perf_counter()
        flag = ("--weight-sync", "rdt", "--load-format", "dummy")
        with vllm_server(folder, args.logs / "vllm-rdt.log", *flag) as (url, _):
            note(result, "start_s", round(time.perf_counter() - started, 1))
            before = prompt_logprobs(url)
            version = 1
            for mode, kv_cache, clients in (
                ("staged", "recompute", 0),
                ("staged", "keep", args.clients),
                ("staged", "recompute", args.clients),
                ("inplace", "keep", args.clients),
            ):
                syncs = args.syncs if clients and kv_cache == "recompute" else args.syncs // 2
                with WeightSync.connect("vllm", engines=[url], mode=mode, timeout_s=TIMEOUT_S) as sync:
                    note(result, "connected", next(iter(sync.engines.values()))[0])
                    load = Load(url, clients)
                    numbers = range(version, version + syncs + WARM_UP)
                    run_syncs(sync, trainer, numbers[:WARM_UP], kv_cache)
                    used = used_gpu_bytes()
                    samples = run_syncs(sync, trainer, numbers[WARM_UP:], kv_cache)
                    load.stop()
                    version = numbers[-1] + 1
                    name = f"{mode}, {kv_cache}, {clients} requests in flight"
                    facts = {
                        "requests_done": load.done,
                        "requests_failed": load.failed,
                        "tokens": load.tokens,
                        "gpu_growth_bytes": used_gpu_bytes() - used,
                        "bytes_equal": sync.verify().bytes_equal,
                    }
                    note(result["runs"], name, {**facts, "phases": summarize(samples)})
            with WeightSync.connect("vllm", engines=[url], timeout_s=TIMEOUT_S) as sync:
                version += (version + 1) % 2
                run_syncs(sync, trainer, range(version, version + 1), "recompute")
                synced = prompt_logprobs(url)
        ray.get(trainer.close.remote(), timeout=TIMEOUT_S)
        ray.kill(trainer)
        with vllm_server(folder, args.logs / "vllm-plain.log") as (url, _):
            plain = prompt_logprobs(url)
        note(result, "logprobs_before", max(abs(a - b) for a, b in zip(before, plain, strict=True)))
        note(result, "logprobs_after", max(abs(a - b) for a, b in zip(synced, plain, strict=True)))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def note(into: dict[str, Any], name: str, value: Any) -> None:
    """Keep a fact and print it at once, so that a run that ends early has told what it knew."""
    into[name] = value
    print(name, json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
