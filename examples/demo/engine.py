"""The demo's engine: a vLLM server in a process of its own, asked over its OpenAI routes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import Sequence

START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0


class VllmServer:
    """``vllm serve MODEL --weight-sync rdt`` on a free loopback port. A context manager that ends it.

    Args:
        model_dir: a transformers model directory.
        log_file: takes everything that the server prints.
    """

    name = "vllm"

    def __init__(self, model_dir: Path, log_file: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self._log_file = log_file
        self._client = httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S, trust_env=False)
        self.command = (
            *(str(Path(sys.executable).parent / "vllm"), "serve", str(model_dir)),
            *("--weight-sync", "rdt"),
            *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"),
            *("--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port)),
        )

    def __enter__(self) -> Self:
        # A laptop's worth of KV cache, no model hub and no statistics; weight sync itself needs no variable.
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_TIMEOUT_S)

    def wait_ready(self) -> None:
        """Block until the server answers its health route.

        Raises:
            RuntimeError: it ended, or did not answer in time; the message ends with its last lines.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self._client.get("/health").is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        tail = "\n".join(self._log_file.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"the engine did not start ({' '.join(self.command)}):\n{tail}")

    def version(self) -> str:
        """The engine's make and version."""
        return f"{self.name} {self._get('/version')['version']}"

    def weight_version(self) -> str:
        """The version label of the weights that serve now."""
        return str(self._get("/weight_info")["weight_version"])

    def ask(self, question: str, max_tokens: int = 32) -> str:
        """The greedy answer of the chat route."""
        body = {
            "model": "policy",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        return str(self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"]).strip()

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of every token after the first, given those before it."""
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

    def _get(self, path: str) -> dict[str, Any]:
        return dict(self._client.get(path).raise_for_status().json())

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return dict(self._client.post(path, json=body).raise_for_status().json())
