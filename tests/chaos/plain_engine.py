"""An engine server of one rank: a real model in transformers, with the real subscriber and the real routes.

It starts in seconds where vLLM and SGLang take a minute, so it is the one that chaos kills most. Run as
``python -m tests.chaos.plain_engine --port P``.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from torch import nn

from rdt_core.engine_routes import make_router
from rdt_core.error_wire import to_wire
from rdt_core.errors import EngineTornError
from tests.chaos.model import NUM_TOKENS, PROMPT, make_model, say_next
from tests.integration.toy_engine import ToyBackend

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


class LoadableModel(nn.Module):
    """The model with a loader of the usual kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.inner.named_parameters())
        for name, tensor in weights:
            parameters[name].data.copy_(tensor)


def make_app() -> FastAPI:
    """The server: ``/generate`` answers tokens, each with the version that made it."""
    app = FastAPI()
    model: Any = LoadableModel()
    backend = ToyBackend(model)

    def step(tokens: list[int]) -> tuple[int, int] | None:
        """One token and its version, in the model's thread; commits come between two of these."""
        if backend.subscriber.is_torn:
            return None
        return say_next(model.inner, tokens), backend.subscriber.version

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.post("/generate")
    async def generate() -> JSONResponse:
        tokens, versions = list(PROMPT), []
        for _ in range(NUM_TOKENS):
            said = await backend.in_model_thread(step, tokens)
            if said is None:
                error = EngineTornError(backend.engine, backend.subscriber.version)
                return JSONResponse({"error": to_wire(error)}, status_code=503)
            tokens.append(said[0])
            versions.append(said[1])
        return JSONResponse({"tokens": tokens[len(PROMPT) :], "versions": versions})

    def backend_of(request: Request) -> ToyBackend:
        del request
        return backend

    app.include_router(make_router(backend_of, ()))
    return app


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(make_app(), host="127.0.0.1", port=parser.parse_args().port, log_level="warning")


if __name__ == "__main__":
    main()
