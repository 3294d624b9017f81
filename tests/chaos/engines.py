"""The engines of a chaos run as processes: a real vLLM, a real SGLang, and a plain one in transformers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.chaos.model import NUM_TOKENS, PROMPT
from tests.e2e.processes import ROOT, STOP_TIMEOUT_S, find_port

if TYPE_CHECKING:
    from collections.abc import Callable

READY_TIMEOUT_S = 300.0
ASK_TIMEOUT_S = 60.0
# What SGLang's servers must learn from their driver instead.
_NOT_INHERITED = ("RAY_ADDRESS", "RAY_AUTH_MODE")


@dataclass(frozen=True, slots=True)
class Said:
    """What an engine answered to the prompt: tokens, and the version of each; -1 where it named none.

    Fewer tokens than were asked for, or none, when it aborted the request.
    """

    tokens: tuple[int, ...]
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """One make of engine.

    Args:
        name: as on the command line.
        command: of a server, given its Python, the checkpoint and a port.
        ready: the path that answers as soon as the server can.
        ask: the prompt, to a server's URL.
    """

    name: str
    command: Callable[[str, Path, int], list[str]]
    ready: str
    ask: Callable[[str], httpx.Response]
    parse: Callable[[httpx.Response], Said]


class EngineProcess:
    """One engine server. Started at once, not awaited; ended by its process group.

    Args:
        kind: of engine.
        python: its interpreter.
        checkpoint: that it loads at start.
    """

    def __init__(self, kind: Kind, python: str, checkpoint: Path) -> None:
        self.kind = kind
        port = find_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.NamedTemporaryFile(prefix=f"chaos-{kind.name}-", suffix=".log")  # noqa: SIM115  closed by stop
        env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        self.process = subprocess.Popen(
            kind.command(python, checkpoint, port),
            cwd=ROOT,
            env={**env, **_ENV},
            stdout=self._log,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            process_group=0,
        )

    @property
    def is_alive(self) -> bool:
        """Whether its first process runs, stopped or not."""
        return self.process.poll() is None

    def is_ready(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(self.url + self.kind.ready, timeout=5).is_success
        return False

    def wait_until_ready(self) -> None:
        """Block until it answers.

        Raises:
            RuntimeError: it ended, or took too long; says the end of its log.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self.is_ready():
            if not self.is_alive or time.monotonic() > deadline:
                raise RuntimeError(f"{self.kind.name} is not ready: {self.tail()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)

    def ask(self) -> Said | None:
        """The answer to the prompt; None when the engine refuses as torn.

        Raises:
            httpx.HTTPError: it did not answer.
        """
        answer = self.kind.ask(self.url)
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            return None
        answer.raise_for_status()
        return self.kind.parse(answer)

    def signal(self, number: int) -> None:
        """To every process of the engine."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def tail(self) -> str:
        """The end of its log."""
        return Path(self._log.name).read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        """End it. Idempotent."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        self.signal(signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_S)
        self._log.close()


_ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}


def _plain_command(python: str, checkpoint: Path, port: int) -> list[str]:
    del checkpoint
    return [python, "-m", "tests.chaos.plain_engine", "--port", str(port)]


def _ask_plain(url: str) -> httpx.Response:
    return httpx.post(f"{url}/generate", json={}, timeout=ASK_TIMEOUT_S)


def _parse_plain(answer: httpx.Response) -> Said:
    body = answer.json()
    return Said(tuple(body["tokens"]), tuple(body["versions"]))


def _vllm_command(python: str, checkpoint: Path, port: int) -> list[str]:
    small = ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--dtype", "float32"]
    # Scale-out adds the one route whose answers carry the weight version of every token.
    ours = ["--weight-sync", "rdt", "--enable-scale-out", "--served-model-name", "m"]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [python, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), *where, *small, *ours]


def _ask_vllm(url: str) -> httpx.Response:
    sampling = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body = {"token_ids": PROMPT, "sampling_params": sampling, "stream": True}
    return httpx.post(f"{url}/inference/v1/generate", json=body, timeout=ASK_TIMEOUT_S)


def _parse_vllm(answer: httpx.Response) -> Said:
    lines = (line for line in answer.text.splitlines() if line.startswith("data: {"))
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
    if not choices:
        raise httpx.RemoteProtocolError(f"a stream without an answer: {answer.text[-300:]!r}")
    tokens = [token for choice in choices for token in choice["token_ids"]]
    return Said(tuple(tokens), _spread(choices[-1]["weight_versions"] or [], len(tokens)))


def _sglang_command(python: str, checkpoint: Path, port: int) -> list[str]:
    plain = ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    plain += ["--grammar-backend", "none", "--cuda-graph-backend-decode", "disabled"]
    plain += ["--cuda-graph-backend-prefill", "disabled", "--disable-custom-all-reduce"]
    small = ["--mem-fraction-static", "0.5", "--max-total-tokens", "2048", "--dtype", "float32"]
    small += ["--skip-server-warmup", "--sleep-on-idle", "--disable-overlap-schedule"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--model-path", str(checkpoint)]
    return [python, "-m", "sglang.launch_server", *where, *plain, *small, "--weight-sync", "rdt"]


def _ask_sglang(url: str) -> httpx.Response:
    sampling = {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling}
    return httpx.post(f"{url}/generate", json=body, timeout=ASK_TIMEOUT_S)


def _parse_sglang(answer: httpx.Response) -> Said:
    body = answer.json()
    tokens = tuple(body["output_ids"])
    return Said(tokens, _spread(body["meta_info"]["weight_versions"], len(tokens)))


def _spread(spans: list[dict[str, Any]], num_tokens: int) -> tuple[int, ...]:
    """One version a token, from spans; -1 where no span says one."""
    versions = [-1] * num_tokens
    for span in spans:
        for at in range(span["start"], min(span["end"], num_tokens)):
            versions[at] = int(span["version"]) if str(span["version"]).isdecimal() else -1
    return tuple(versions)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain", _plain_command, "/health", _ask_plain, _parse_plain),
        Kind("vllm", _vllm_command, "/health", _ask_vllm, _parse_vllm),
        Kind("sglang", _sglang_command, "/model_info", _ask_sglang, _parse_sglang),
    )
}

THIS_PYTHON = sys.executable
