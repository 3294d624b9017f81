"""AReaL-style use: a gateway, a trainer and an engine that are driven by HTTP requests only."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import httpx
from engine import child, free_port, prompt_logprobs, wait_until_healthy

TEXT = [5, 17, 300, 41, 2, 111, 260, 8]
PAIR = "actor-rollout"
REQUEST_TIMEOUT_S = 400.0
TOLERANCE = 1e-3


def run_gateway_use(model: Path, engine: str, logs: Path, num_updates: int = 2) -> list[str]:
    """Connect, train and update, disconnect; returns what was not as it should be."""
    trainer_port, gateway_port = free_port(), free_port()
    trainer, gateway = f"http://127.0.0.1:{trainer_port}", f"http://127.0.0.1:{gateway_port}"
    key = secrets.token_urlsafe(16)
    here = Path(__file__).parent
    trainer_command = [sys.executable, str(here / "areal_trainer.py"), "--model", str(model)]
    gateway_command = [sys.executable, "-m", "rdt_core.gateway", "--host", "127.0.0.1"]
    with (
        child([*trainer_command, "--port", str(trainer_port)], logs / "areal_trainer.log") as trainer_process,
        child(
            [*gateway_command, "--port", str(gateway_port), "--log-level", "info"],
            logs / "gateway.log",
            {"RDT_GATEWAY_API_KEY": key},
        ) as gateway_process,
        httpx.Client(
            base_url=gateway, headers={"Authorization": f"Bearer {key}"}, timeout=REQUEST_TIMEOUT_S
        ) as client,
    ):
        wait_until_healthy(trainer, trainer_process, logs / "areal_trainer.log")
        wait_until_healthy(gateway, gateway_process, logs / "gateway.log")
        return drive(client, trainer, engine, num_updates)


def drive(client: httpx.Client, trainer: str, engine: str, num_updates: int) -> list[str]:
    """The requests that AReaL's controller sends, with a train step before every update."""
    failures = []
    pair = {
        "pair_name": PAIR,
        "train_worker_urls": [trainer],
        "inference_worker_urls": [engine],
        "mode": "rdt",
    }
    client.post("/connect", json=pair).raise_for_status()
    for version in range(1, num_updates + 1):
        httpx.post(f"{trainer}/train", timeout=REQUEST_TIMEOUT_S).raise_for_status()
        answer = client.post("/update_weights", json={"pair_name": PAIR, "version": version})
        answer.raise_for_status()
        trained = httpx.post(f"{trainer}/logprobs", json={"tokens": TEXT}, timeout=REQUEST_TIMEOUT_S).json()
        served = prompt_logprobs(engine, TEXT)
        difference = max(abs(a - b) for a, b in zip(trained, served, strict=True))
        print(
            f"version {version}: {answer.json()['duration_ms']:.0f} ms, logprobs differ by {difference:.1e}"
        )
        if difference > TOLERANCE:
            failures.append(f"version {version}: the engine's log-probabilities differ by {difference}")
    client.post("/disconnect", json={"pair_name": PAIR}).raise_for_status()
    return failures
