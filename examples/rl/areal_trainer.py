"""A trainer that is driven over HTTP, as AReaL's are: its own FastAPI app, with our router in it.

    python areal_trainer.py --model DIR --port 7001

``/train`` and ``/logprobs`` stand for what such a trainer serves anyway; what is ours is two lines.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from policy import NUM_WORDS, load_policy, response_logprobs
from pydantic import BaseModel

from rdt_core.trainer_routes import TrainerWorker, make_router
from rdt_megatron import fsdp_shards


class Tokens(BaseModel):
    """A text."""

    tokens: list[int]


def make_app(model: torch.nn.Module) -> FastAPI:
    """The trainer's app."""
    app = FastAPI()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    worker = TrainerWorker("areal-actor", fsdp_shards(model))
    app.include_router(make_router(worker))

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/train")
    def train() -> dict[str, float]:
        """One step on random text; enough to change every weight."""
        text = torch.randint(NUM_WORDS, (8, 16))
        loss = -response_logprobs(model, text, 1).mean()
        torch.autograd.backward(loss)
        with worker.writing():
            optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item()}

    @app.post("/logprobs")
    def logprobs(body: Tokens) -> list[float]:
        with torch.no_grad():
            return [float(p) for p in response_logprobs(model, torch.tensor([body.tokens]), 1)[0]]

    return app


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    uvicorn.run(make_app(load_policy(args.model)), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
