"""The demo's engines: servers in processes of their own, asked over their HTTP routes."""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, ClassVar, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0


class EngineServer(abc.ABC):
    """An engine with ``--weight-sync rdt`` on a free loopback port. A context manager that ends it.

    Args:
        python: the interpreter beside which the engine is installed.
        model_dir: a transformers model directory.
        log_file: takes everything that the server prints.
    """

    name: str
    env: ClassVar[Mapping[str, str]]

    def __init__(self, python: Path, model_dir: Path, log_file: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self._log_file = log_file
        self._client = httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S, trust_env=False)
        self.command = self._make_command(python, model_dir, port)

    @abc.abstractmethod
    def _make_command(self, python: Path, model_dir: Path, port: int) -> tuple[str, ...]: ...

    @abc.abstractmethod
    def weight_version(self) -> str:
        """The version label of the weights that serve now."""

    @abc.abstractmethod
    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of every token after the first, given those before it."""

    def __enter__(self) -> Self:
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **self.env},
                process_group=0,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        # It leads a process group: whatever is left of that ends with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_STOP_TIMEOUT_S)

    def wait_ready(self) -> None:
        """Block until the server answers.

        Raises:
            RuntimeError: it ended, or did not answer in time; the message ends with its last lines.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self._client.get("/rdt/status").is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        tail = "\n".join(self._log_file.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"the engine did not start ({' '.join(self.command)}):\n{tail}")

    def version(self) -> str:
        """The engine's make and version."""
        return str(self._get("/rdt/status")["engine"])

    def ask(self, question: str, max_tokens: int = 32) -> str:
        """The greedy answer of the chat route."""
        body = {
            "model": "policy",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        return str(self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"]).strip()

    def _get(self, path: str) -> dict[str, Any]:
        return dict(self._client.get(path).raise_for_status().json())

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return dict(self._client.post(path, json=body).raise_for_status().json())


class VllmServer(EngineServer):
    """``vllm serve MODEL --weight-sync rdt``."""

    name = "vllm"
    # A laptop's worth of KV cache and no statistics; weight sync itself needs no variable.
    env: ClassVar[Mapping[str, str]] = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

    def _make_command(self, python: Path, model_dir: Path, port: int) -> tuple[str, ...]:
        return (
            *(str(python.parent / "vllm"), "serve", str(model_dir)),
            *("--weight-sync", "rdt"),
            *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"),
            *("--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port)),
        )

    def weight_version(self) -> str:
        """See :class:`EngineServer`."""
        return str(self._get("/weight_info")["weight_version"])

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """See :class:`EngineServer`."""
        body = {
            "model": "policy",
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        rows = self._post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [
            float(row[str(token)]["logprob"])
            for row, token in zip(rows[1:], list(token_ids)[1:], strict=True)
        ]


class SglangServer(EngineServer):
    """``python -m sglang.launch_server --model-path MODEL --weight-sync rdt``, in plain torch on a CPU."""

    name = "sglang"
    env: ClassVar[Mapping[str, str]] = {"TORCHDYNAMO_DISABLE": "1"}

    def _make_command(self, python: Path, model_dir: Path, port: int) -> tuple[str, ...]:
        return (
            *(str(python), "-m", "sglang.launch_server", "--model-path", str(model_dir)),
            *("--weight-sync", "rdt"),
            *("--dtype", "float32", "--context-length", "512", "--max-total-tokens", "4096"),
            *("--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port)),
            *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
            *("--grammar-backend", "none", "--mem-fraction-static", "0.5", "--skip-server-warmup"),
            *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
        )

    def weight_version(self) -> str:
        """See :class:`EngineServer`."""
        return str(self._get("/model_info")["weight_version"])

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """See :class:`EngineServer`."""
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        rows = self._post("/generate", body)["meta_info"]["input_token_logprobs"]
        return [float(row[0]) for row in rows[1:]]


ENGINES: dict[str, type[EngineServer]] = {engine.name: engine for engine in (VllmServer, SglangServer)}
