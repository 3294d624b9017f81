"""An engine process for benchmarks: the fused layout of a real engine, our subscriber, our routes.

Run by ``sync.py`` as ``python benchmarks/engine_process.py --case smollm2 --port P``. With several ranks each
has a process of its own, as in a real engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import torch
import uvicorn
from cases import CASES, region_of
from fastapi import FastAPI, Request
from torch import nn

from rdt_core import engine_rpc
from rdt_core.engine_routes import make_router
from rdt_core.recorder import record_loader
from rdt_core.subscriber import WeightSubscriber

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from multiprocessing.connection import Connection

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
    """A rank's parameters as an engine lays them out: q, k, v in one, gate and up in one."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], device: torch.device, rank: int, size: int
    ) -> None:
        super().__init__()
        self._place: dict[str, tuple[str, int, tuple[int, ...], tuple[int, ...]]] = {}
        rows: dict[str, int] = {}
        widths: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            fused = ".".join(FUSED.get(part, part) for part in name.split("."))
            region = region_of(name, shape, rank, size)
            self._place[name] = (fused.replace(".", "-"), rows.get(fused, 0), region.start, region.shape)
            rows[fused] = rows.get(fused, 0) + region.shape[0]
            widths[fused] = region.shape[1:]
        for fused, count in rows.items():
            data = torch.zeros(count, *widths[fused], dtype=torch.bfloat16, device=device)
            self.register_parameter(fused.replace(".", "-"), nn.Parameter(data, requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy this rank's part of every tensor to its rows."""
        for name, tensor in weights:
            fused, row, start, shape = self._place[name]
            part = tensor
            for dim, (first, count) in enumerate(zip(start, shape, strict=True)):
                if count != tensor.shape[dim]:
                    part = part.narrow(dim, first, count)
            self.get_parameter(fused).data.narrow(0, row, shape[0]).copy_(part)


class BenchModel:
    """See :class:`rdt_core.engine_model.EngineModel`."""

    is_asleep = False

    def __init__(self, case: str, device: torch.device, rank: int, size: int) -> None:
        self.rank, self.world_size, self.device = rank, size, device
        self._model = FusedModel(CASES[case].shapes(), device, rank, size)

    def record(self, specs: Sequence[TensorSpec]) -> Recording:
        """Record the loader."""
        return record_loader(self._model, specs)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load whole tensors."""
        self._model.load_weights(tensors)

    def finalize(self) -> None:
        """Nothing is derived here."""


def make_subscriber(case: str, device: torch.device, rank: int, size: int) -> WeightSubscriber:
    """A rank's subscriber, made in the thread that will use it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return WeightSubscriber(BenchModel(case, device, rank, size))


def call(subscriber: WeightSubscriber, method: str, payload: dict[str, Any]) -> dict[str, Any]:
    """One control call. What a connect leaves behind stays: the collector need not walk it in a commit."""
    answer = engine_rpc.call(subscriber, method, payload)
    if method == "connect":
        gc.collect()
        gc.freeze()
    return answer


class Ranks(Protocol):
    """How the server reaches its ranks."""

    def call(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """Run a control method on every rank."""


class LocalRank:
    """One rank, in this process. Made and called in one thread.

    Everything torch does happens in that thread: each thread that runs a parallel operation gets an OpenMP
    team of its own, and on few cores two teams slow each other down.
    """

    def __init__(self, case: str, device: torch.device) -> None:
        self._subscriber = make_subscriber(case, device, 0, 1)

    def call(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """See :class:`Ranks`."""
        return [call(self._subscriber, method, payload)]


class ProcessRanks:
    """One process a rank, each seeing one GPU only."""

    def __init__(self, case: str, device: str, gpus: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for rank, gpu in enumerate(gpus):
            ours, theirs = context.Pipe()
            arguments = (theirs, case, device, gpu, rank, len(gpus))
            context.Process(target=serve_rank, args=arguments, daemon=True).start()
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def call(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """See :class:`Ranks`."""
        for pipe in self._pipes:
            pipe.send((method, payload))
        return [pipe.recv() for pipe in self._pipes]


def serve_rank(pipe: Connection, case: str, device: str, gpu: str, rank: int, size: int) -> None:
    """Body of a rank's process."""
    if device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    subscriber = make_subscriber(
        case, torch.device(device, 0) if device == "cuda" else torch.device(device), rank, size
    )
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(call(subscriber, *pipe.recv()))


class BenchBackend:
    """See :class:`rdt_core.engine_routes.EngineBackend`."""

    engine = "benchmark"

    def __init__(self, case: str, device: str, gpus: Sequence[str]) -> None:
        self.world_size = len(gpus)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ranks = self._thread.submit(self._make, case, device, gpus).result()

    @staticmethod
    def _make(case: str, device: str, gpus: Sequence[str]) -> Ranks:
        if len(gpus) > 1:
            return ProcessRanks(case, device, gpus)
        return LocalRank(case, torch.device("cuda", 0) if device == "cuda" else torch.device(device))

    async def call(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """See :class:`rdt_core.engine_routes.EngineBackend`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._ranks.call, method, payload)

    async def commit(self, payload: dict[str, Any]) -> dict[str, Any]:
        """See :class:`rdt_core.engine_routes.EngineBackend`."""
        started = time.perf_counter()
        ranks = await self.call("commit", payload)
        return {"ranks": ranks, "stall_s": time.perf_counter() - started}


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--gpus", default="0", help="one a rank, by comma")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    gpus = args.gpus.split(",")
    if args.device == "cuda" and len(gpus) == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]
    backend = BenchBackend(args.case, args.device, gpus)
    app = FastAPI()

    def backend_of(request: Request) -> BenchBackend:
        del request
        return backend

    @app.get("/memory")
    async def memory() -> dict[str, int]:
        if args.device == "cuda":
            return {"bytes": int(torch.cuda.memory_reserved()) if len(gpus) == 1 else 0}
        return {"bytes": psutil.Process().memory_info().rss}

    app.include_router(make_router(backend_of, ()))
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
