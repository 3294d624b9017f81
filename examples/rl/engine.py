"""A running vLLM, started as everybody starts one, with ``--weight-sync rdt``."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_TIMEOUT_S = 400.0
REQUEST_TIMEOUT_S = 120.0


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def vllm_server(model: Path, log: Path) -> Iterator[str]:
    """``vllm serve MODEL --weight-sync rdt``; yields its URL once it answers, and ends it."""
    port = free_port()
    command = [
        *(str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--weight-sync", "rdt"),
        *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64", "--enforce-eager"),
        *("--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port)),
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    url = f"http://127.0.0.1:{port}"
    with child(command, log, environment) as process:
        wait_until_healthy(url, process, log)
        yield url


@contextlib.contextmanager
def child(
    command: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of our own with its output in a file, ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Block until ``/health`` answers.

    Raises:
        RuntimeError: the process ended, or did not answer in time; the message ends with its last lines.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5.0).is_success:
                return
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"{process.args!r} did not become healthy:\n{tail}")


def sample(url: str, prompt: Sequence[int], num_samples: int, num_tokens: int) -> list[list[int]]:
    """Responses of the engine, as token ids, drawn at temperature 1."""
    body = {
        "model": "policy",
        "prompt": list(prompt),
        "n": num_samples,
        "max_tokens": num_tokens,
        "temperature": 1.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=REQUEST_TIMEOUT_S).raise_for_status()
    return [list(choice["token_ids"]) for choice in answer.json()["choices"]]


def prompt_logprobs(url: str, tokens: Sequence[int]) -> list[float]:
    """What the engine gives for every token after the first, given those before it."""
    body = {"model": "policy", "prompt": list(tokens), "max_tokens": 1, "prompt_logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=REQUEST_TIMEOUT_S).raise_for_status()
    rows = answer.json()["choices"][0]["prompt_logprobs"][1:]
    return [float(row[str(token)]["logprob"]) for row, token in zip(rows, tokens[1:], strict=True)]
