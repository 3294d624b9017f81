"""A small engine server: a real model in a real process, with the real subscriber and the real routes.

It stands where an inference engine would when a test is about rdt-core and not about vLLM or SGLang: fused
projections, a padded vocabulary and tied embeddings, loaded by a loader of the usual kind. Run as
``python -m tests.integration.toy_engine --port P``; prints ``ready`` when it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from torch import nn

from rdt_core import engine_rpc
from rdt_core.engine_routes import make_router
from rdt_core.error_wire import to_wire
from rdt_core.errors import EngineTornError
from rdt_core.recorder import record_loader
from rdt_core.subscriber import WeightSubscriber
from tests import spans

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rdt_core.client import Channel
    from rdt_core.manifest import TensorSpec
    from rdt_core.recording import Recording

HIDDEN = 64
PADDED_VOCAB = 128


class ToyModel(nn.Module):
    """Embeddings tied to the head, one fused qkv, one norm; vocabulary padded to 128 rows."""

    def __init__(self, vocab: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab = vocab
        self.embed = nn.Parameter(torch.zeros(PADDED_VOCAB, HIDDEN, dtype=dtype), requires_grad=False)
        self.qkv = nn.Parameter(torch.zeros(3 * HIDDEN, HIDDEN, dtype=dtype), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(HIDDEN, dtype=dtype), requires_grad=False)
        self.head = self.embed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take checkpoint tensors the way engine loaders do."""
        for name, tensor in weights:
            if name == "embed.weight":
                if tensor.shape != (self.vocab, HIDDEN):
                    raise ValueError(f"expected {(self.vocab, HIDDEN)}, got {tuple(tensor.shape)}")
                self.embed.data[: self.vocab].copy_(tensor)
                self.embed.data[self.vocab :].fill_(0)
            elif name in ("q.weight", "k.weight", "v.weight"):
                self.qkv.data.narrow(0, "qkv".index(name[0]) * HIDDEN, HIDDEN).copy_(tensor)
            elif name == "norm.weight":
                self.norm.data.copy_(tensor)
            else:
                raise KeyError(name)


class ToyEngineModel:
    """The adapter's part: see :class:`rdt_core.engine_model.EngineModel`."""

    rank = 0
    world_size = 1

    def __init__(self, model: ToyModel) -> None:
        self.model, self.device = model, torch.device("cpu")
        self.num_finalized = 0
        self.is_asleep = False

    def record(self, specs: Sequence[TensorSpec]) -> Recording:
        return record_loader(self.model, specs)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.model.load_weights(tensors)

    def finalize(self) -> None:
        self.num_finalized += 1


class ToyBackend:
    """One worker rank, in the thread that runs the model."""

    engine = "toy 1.0"
    world_size = 1

    def __init__(self, model: ToyModel, channel: Channel | None = None) -> None:
        self.model = model
        self.subscriber = WeightSubscriber(ToyEngineModel(model), channel=channel)
        self._model_thread = ThreadPoolExecutor(max_workers=1)

    async def call(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        return [await self.in_model_thread(engine_rpc.call, self.subscriber, method, payload)]

    async def commit(self, payload: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        ranks = await self.call("commit", payload)
        return {"ranks": ranks, "stall_s": time.perf_counter() - started}

    async def in_model_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, function, *args)


def fingerprint(model: ToyModel) -> dict[str, str]:
    """A digest of every parameter's bytes."""
    return {
        name: hashlib.sha256(parameter.detach().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def make_app(
    vocab: int,
    dtype: torch.dtype,
    api_keys: Sequence[str],
    *,
    has_weight_sync: bool = True,
    channel: Channel | None = None,
) -> FastAPI:
    """The server; without weight sync it is an engine that was started without the flag."""
    app = FastAPI()
    backend = ToyBackend(ToyModel(vocab, dtype), channel)

    @app.get("/fingerprint")
    async def get_fingerprint() -> JSONResponse:
        if backend.subscriber.is_torn:
            error = EngineTornError(backend.engine, backend.subscriber.version)
            return JSONResponse({"error": to_wire(error)}, status_code=503)
        return JSONResponse(await backend.in_model_thread(fingerprint, backend.model))

    if has_weight_sync:

        def backend_of(request: Request) -> ToyBackend:
            del request
            return backend

        app.include_router(make_router(backend_of, api_keys))
    return app


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--vocab", type=int, default=100)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--without-weight-sync", action="store_true")
    args = parser.parse_args()
    if spans.is_wanted():
        spans.write_to_folder()
    app = make_app(
        args.vocab, getattr(torch, args.dtype), args.api_key, has_weight_sync=not args.without_weight_sync
    )
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
