"""The gateway's side of the routes that trainers serve (``rdt_core.trainer_routes``)."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx

from rdt_core.error_wire import from_wire
from rdt_core.errors import RdtError
from rdt_core.gateway.errors import TrainerWorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_TEARDOWN_TIMEOUT_S = 20.0
_MAX_AT_ONCE = 64
_MAX_DETAIL = 300


class TrainerWorkers:
    """All trainer ranks of one pair, by their URLs. Used from the pair's one thread.

    Args:
        urls: one a rank.
        api_key: of the trainers' apps, if they have one; never logged.
    """

    def __init__(self, urls: Sequence[str], *, api_key: str = "") -> None:
        self._urls = tuple(url.rstrip("/") for url in urls)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(headers=headers, trust_env=False)
        self._pool = ThreadPoolExecutor(max_workers=max(1, min(len(urls), _MAX_AT_ONCE)))

    def learn_group(self, timeout_s: float) -> str:
        """The sync group that these workers are the trainer ranks of.

        Raises:
            TrainerWorkerError: one does not answer, they are of several groups, or ranks are missing.
        """
        told = self._each(lambda url: self._call("GET", url, "report_parallelism", None, timeout_s))
        group, world_size = str(told[0].get("group", "")), told[0].get("world_size")
        for url, answer in zip(self._urls, told, strict=True):
            if answer.get("group") != group or answer.get("world_size") != world_size:
                reason = (
                    f"it is of group {answer.get('group')!r} with {answer.get('world_size')} ranks, and "
                    f"{self._urls[0]} is of group {group!r} with {world_size}"
                )
                raise TrainerWorkerError(url, reason)
        ranks = sorted(int(answer.get("rank", -1)) for answer in told)
        if not group or ranks != list(range(int(world_size or 0))):
            reason = f"the workers are ranks {ranks} of {world_size} of group {group!r}, not each rank once"
            raise TrainerWorkerError(self._urls[0], reason)
        return group

    def init(self, pair: str, num_engines: int, timeout_s: float) -> None:
        """Have every rank attach to its group for this pair. Safe to repeat."""
        payload = {"pair_name": pair, "num_engines": num_engines, "train_world_size": len(self._urls)}
        self._each(lambda url: self._call("POST", url, "init_weight_update_group", payload, timeout_s))

    def publish(self, pair: str, version: int, timeout_s: float) -> None:
        """Have every rank publish what its parameters hold. Safe to repeat with the same version."""
        payload = {"pair_name": pair, "version": version}
        self._each(lambda url: self._call("POST", url, "update_weights", payload, timeout_s))

    def teardown(self, pair: str) -> None:
        """Have every rank leave; one that does not answer is logged and left alone."""

        def leave(url: str) -> dict[str, Any]:
            try:
                return self._call("POST", url, "teardown", {"pair_name": pair}, _TEARDOWN_TIMEOUT_S)
            except RdtError as error:
                logger.warning("pair %s: %s", pair, error)
                return {}

        self._each(leave)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _each(self, act: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
        """Act on every worker at once; wait for all, then raise the first error."""
        futures = [self._pool.submit(act, url) for url in self._urls]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in futures]

    def _call(
        self, verb: str, url: str, route: str, payload: dict[str, Any] | None, timeout_s: float
    ) -> dict[str, Any]:
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
        try:
            response = self._client.request(verb, f"{url}/rdt/{route}", json=payload, timeout=timeout)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            reason = f"it does not answer /rdt/{route}: {type(error).__name__} {error}".strip()
            raise TrainerWorkerError(url, reason) from error
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            raise from_wire(body["error"])
        detail = response.text[:_MAX_DETAIL]
        raise TrainerWorkerError(url, f"it answered {response.status_code} to /rdt/{route}: {detail}")
