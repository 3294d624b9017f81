"""HTTP routes that a trainer's own FastAPI app includes, so that a gateway can drive it, ``/rdt/*``.

For trainers that are driven over HTTP, AReaL's for instance. A trainer that calls
``WeightPublisher.attach`` and ``publish`` in its own loop needs none of this. Bodies are JSON of plain
values, bounded in size; no pickle, no weight byte and no address of memory passes here.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from rdt_core.engine_routes import answer_error, key_guard, read_body
from rdt_core.engine_rpc import parse_version
from rdt_core.errors import ConfigError, NotConnectedError, RdtError, WireFormatError
from rdt_core.publisher import WeightPublisher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rdt_core.client import Channel
    from rdt_core.local_shards import LocalShards


class TrainerWorker:
    """One trainer rank that a gateway drives: attaches for the first pair, leaves after the last.

    Methods may be called from any thread and block as the publisher's do. ``publish`` tells engines that
    they may read what the parameters hold *now*: whoever drives must not call it during a step.

    Args:
        group: name of the sync group, the same in every rank.
        local: what an exporter found, for instance ``rdt_megatron.fsdp_shards(model)``.
        channel: how to reach the coordinator; by default the group's named Ray actor.
    """

    def __init__(self, group: str, local: LocalShards, *, channel: Channel | None = None) -> None:
        self._group = group
        self._local = local
        self._channel = channel
        self._publisher: WeightPublisher | None = None
        self._pairs: set[str] = set()
        self._lock = threading.Lock()

    def report_parallelism(self) -> dict[str, Any]:
        """Which rank this is, of how many, of which group."""
        return {"group": self._group, "rank": self._local.rank, "world_size": self._local.world_size}

    def report_weight_meta(self) -> dict[str, Any]:
        """Which region of which tensor this rank holds, by name; no address of memory."""
        shards = [
            {
                "name": shard.spec.name,
                "dtype": shard.spec.dtype,
                "shape": list(shard.spec.shape),
                "start": list(shard.region.start),
                "stop": list(shard.region.stop),
            }
            for shard in self._local.shards
        ]
        return {"rank": self._local.rank, "meta": shards}

    def init(self, pair: str, train_world_size: int | None = None) -> dict[str, Any]:
        """Take part in a pair. Safe to repeat; blocks for seconds on first use.

        Raises:
            ConfigError: the driver counts other ranks than this one does.
            RdtError: attaching failed.
        """
        if train_world_size not in (None, self._local.world_size):
            raise ConfigError(
                f"pair {pair!r} says that there are {train_world_size} trainer ranks; group {self._group!r} "
                f"has {self._local.world_size}. Name the URL of every rank once."
            )
        with self._lock:
            if self._publisher is None:
                self._publisher = WeightPublisher.attach(self._group, self._local, channel=self._channel)
            self._pairs.add(pair)
            return {"status": "ok", "version": self._publisher.version}

    def publish(self, pair: str, version: int) -> dict[str, Any]:
        """Offer what the parameters hold now as ``version``. Safe to repeat with the same version.

        Raises:
            NotConnectedError: there is no such pair.
            RdtError: what ``WeightPublisher.publish`` raises.
        """
        with self._lock:
            if self._publisher is None or pair not in self._pairs:
                raise NotConnectedError(f"publish for pair {pair!r}")
            if version != self._publisher.version:
                self._publisher.publish(version)
            return {"status": "ok", "version": version}

    @contextlib.contextmanager
    def writing(self, *, timeout_s: float = 30.0) -> Iterator[None]:
        """Around whatever writes the parameters: waits until nobody reads them.

        Called by the trainer's own loop; does nothing while no pair is connected. See
        :meth:`rdt_core.publisher.WeightPublisher.writing`.
        """
        with self._lock:
            publisher = self._publisher
        with publisher.writing(timeout_s=timeout_s) if publisher is not None else contextlib.nullcontext():
            yield

    def teardown(self, pair: str) -> dict[str, Any]:
        """Leave a pair; after the last one, leave the group and close every export. Idempotent."""
        with self._lock:
            self._pairs.discard(pair)
            if self._publisher is not None and not self._pairs:
                self._publisher.close()
                self._publisher = None
            return {"status": "ok"}

    def close(self) -> None:
        """Leave all pairs and the group. Idempotent; called when the trainer ends."""
        with self._lock:
            self._pairs.clear()
            publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.close()


def make_router(worker: TrainerWorker, api_keys: Sequence[str] = ()) -> APIRouter:
    """Routes ``/rdt/report_parallelism`` (GET) and ``/rdt/<what TrainerWorker does>`` (POST).

    Args:
        worker: of this process.
        api_keys: any of them must be sent as a bearer token; none leaves the routes open.
    """
    router = APIRouter(prefix="/rdt", dependencies=[Depends(key_guard(api_keys))])

    @router.get("/report_parallelism")
    async def report_parallelism() -> dict[str, Any]:
        return worker.report_parallelism()

    def add(route: str, act: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        async def run(request: Request) -> JSONResponse:
            payload = await read_body(request)
            try:
                return JSONResponse(await run_in_threadpool(act, payload))
            except RdtError as error:
                return answer_error(error)

        run.__name__ = route
        router.add_api_route(f"/{route}", run, methods=["POST"])

    add("report_weight_meta", lambda payload: worker.report_weight_meta())
    add(
        "init_weight_update_group",
        lambda payload: worker.init(_parse_pair(payload), payload.get("train_world_size")),
    )
    add("update_weights", lambda payload: worker.publish(_parse_pair(payload), parse_version(payload)))
    add("teardown", lambda payload: worker.teardown(_parse_pair(payload)))
    return router


def _parse_pair(payload: Mapping[str, Any]) -> str:
    pair = payload.get("pair_name")
    if not isinstance(pair, str) or not pair:
        raise WireFormatError("request", f"pair_name must be a name, got {pair!r}")
    return pair
