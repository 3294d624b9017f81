"""An engine process for benchmarks: the fused layout of a real engine, our subscriber, our routes.

Run by ``sync.py`` as ``python benchmarks/engine.py --case smollm2 --port P``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import torch
import uvicorn
from cases import CASES
from fastapi import FastAPI, Request
from torch import nn

from rdt_core import engine_rpc
from rdt_core.engine_routes import make_router
from rdt_core.recorder import record_loader
from rdt_core.subscriber import WeightSubscriber

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rdt_core.manifest import TensorSpec
    from rdt_core.recording import Recording

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class FusedModel(nn.Module):
    """Parameters as an engine lays them out: q, k, v in one, gate and up in one."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._place: dict[str, tuple[str, int, int]] = {}
        rows: dict[str, int] = {}
        widths: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            fused = ".".join(FUSED.get(part, part) for part in name.split("."))
            start = rows.get(fused, 0)
            self._place[name] = (fused.replace(".", "-"), start, shape[0])
            rows[fused], widths[fused] = start + shape[0], shape[1:]
        for fused, count in rows.items():
            data = torch.zeros(count, *widths[fused], dtype=torch.bfloat16)
            self.register_parameter(fused.replace(".", "-"), nn.Parameter(data, requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy every tensor to its rows."""
        for name, tensor in weights:
            fused, start, count = self._place[name]
            self.get_parameter(fused).data.narrow(0, start, count).copy_(tensor)


class BenchModel:
    """See :class:`rdt_core.engine_model.EngineModel`."""

    rank = 0
    world_size = 1
    device = torch.device("cpu")

    def __init__(self, model: FusedModel) -> None:
        self._model = model

    def record(self, specs: Sequence[TensorSpec]) -> Recording:
        """Record the loader."""
        return record_loader(self._model, specs)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load whole tensors."""
        self._model.load_weights(tensors)

    def finalize(self) -> None:
        """Nothing is derived here."""


class BenchBackend:
    """One rank; its calls run in one thread, as a model's would."""

    engine = "benchmark"
    world_size = 1

    def __init__(self, case: str) -> None:
        # Everything torch does happens in one thread: each thread that runs a parallel operation gets an
        # OpenMP team of its own, and on few cores two teams slow each other down.
        self._thread = ThreadPoolExecutor(max_workers=1)
        model = self._thread.submit(FusedModel, CASES[case].shapes()).result()
        self._subscriber = WeightSubscriber(BenchModel(model))

    async def call(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """See :class:`rdt_core.engine_routes.EngineBackend`."""
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._thread, engine_rpc.call, self._subscriber, method, payload)]

    async def commit(self, payload: dict[str, Any]) -> dict[str, Any]:
        """See :class:`rdt_core.engine_routes.EngineBackend`."""
        started = time.perf_counter()
        ranks = await self.call("commit", payload)
        return {"ranks": ranks, "stall_s": time.perf_counter() - started}


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    backend = BenchBackend(args.case)
    app = FastAPI()

    def backend_of(request: Request) -> BenchBackend:
        del request
        return backend

    @app.get("/rss")
    async def rss() -> dict[str, int]:
        return {"rss_bytes": psutil.Process().memory_info().rss}

    app.include_router(make_router(backend_of, ()))
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
