"""All pairs of a gateway, by name."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from rdt_core.errors import ClosedError, RdtError
from rdt_core.gateway.errors import PairExistsError, UnknownPairError, UnsupportedRequestError
from rdt_core.gateway.pair import Pair, PairNotes, PairSpec
from rdt_core.gateway.trainers import TrainerWorkers
from rdt_core.sync import WeightSync

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from rdt_core.gateway.settings import GatewaySettings
    from rdt_core.observer import SyncObserver

logger = logging.getLogger(__name__)

MAX_PAIRS = 256
_REMEMBERED = 256


class Pairs:
    """Connects, finds and disconnects pairs. Every method may be called from any thread; none waits.

    Args:
        settings: keys, deadlines and the transport.
        observers: are told about the syncs of every pair.
        on_open: is given each group and its driver, once connected.
        connect: makes a driver; :meth:`rdt_core.sync.WeightSync.connect` unless a test brings a group that
            lives in its own process.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        observers: Sequence[SyncObserver] = (),
        *,
        on_open: Callable[[str, WeightSync], None] | None = None,
        connect: Callable[..., WeightSync] = WeightSync.connect,
    ) -> None:
        self._settings = settings
        self._observers = tuple(observers)
        self._on_open = on_open
        self._connect_sync = connect
        self._pairs: dict[str, Pair] = {}
        self._gone: deque[str] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()

    def connect(self, spec: PairSpec, timeout_s: float | None = None) -> Pair:
        """The pair of this spec, connecting or connected; ``pair.connected`` tells when. Safe to repeat.

        A pair that fails to connect is forgotten, so that its name can be used again.

        Args:
            spec: what to bring together.
            timeout_s: for connecting; the settings' own by default.

        Raises:
            PairExistsError: a pair of this name has other workers.
            ClosedError: the pair of this name is still being disconnected.
            UnsupportedRequestError: the spec names no group and no trainer workers.
        """
        if not spec.group and not spec.trainer_workers:
            remedy = "Name the trainers' sync group, or train_worker_urls that tell it."
            raise UnsupportedRequestError("group", "''", remedy)
        with self._lock:
            known = self._pairs.get(spec.name)
            if known is not None:
                if known.is_closing:
                    raise ClosedError(f"pair {spec.name!r}, which is still being disconnected,")
                if known.spec != spec:
                    raise PairExistsError(spec.name)
                return known
            if len(self._pairs) >= MAX_PAIRS:
                raise UnsupportedRequestError("pair_name", spec.name, f"There are {MAX_PAIRS} pairs already.")
            pair = self._make(spec, timeout_s or self._settings.init_timeout_s)
            self._pairs[spec.name] = pair
        pair.connected.add_done_callback(lambda connected: self._forget_if_failed(pair, connected))
        return pair

    def find(self, name: str) -> Pair:
        """The pair of this name.

        Raises:
            UnknownPairError: there is none.
        """
        with self._lock:
            if name not in self._pairs:
                raise UnknownPairError(name)
            return self._pairs[name]

    def all(self) -> list[Pair]:
        """Every pair, by name."""
        with self._lock:
            return [pair for _, pair in sorted(self._pairs.items())]

    def disconnect(self, name: str) -> Future[None] | None:
        """Begin to disconnect a pair; None for one that was disconnected lately, so that a retry succeeds.

        Raises:
            UnknownPairError: there is and was none.
        """
        with self._lock:
            pair = self._pairs.get(name)
            if pair is None:
                if name in self._gone:
                    return None
                raise UnknownPairError(name)
        closing = pair.close()
        closing.add_done_callback(lambda _: self._forget(pair))
        return closing

    def close(self, timeout_s: float) -> None:
        """Disconnect all pairs and wait for it, up to a deadline. Idempotent."""
        closing = [pair.close() for pair in self.all()]
        late = wait(closing, timeout_s).not_done
        if late:
            logger.warning("%d pairs were not disconnected within %.0f s", len(late), timeout_s)

    def _make(self, spec: PairSpec, timeout_s: float) -> Pair:
        workers = None
        if spec.trainer_workers:
            workers = TrainerWorkers(spec.trainer_workers, api_key=self._settings.trainer_api_key)

        def open_sync(group: str, notes: PairNotes) -> WeightSync:
            return self._open_sync(group, spec, notes, timeout_s)

        return Pair(spec, open_sync, workers, timeout_s)

    def _open_sync(self, group: str, spec: PairSpec, notes: PairNotes, timeout_s: float) -> WeightSync:
        if spec.group and group != spec.group:
            remedy = f"The trainer workers are of group {group!r}."
            raise UnsupportedRequestError("group", repr(spec.group), remedy)
        options: dict[str, Any] = {
            "api_key": self._settings.engine_api_key or None,
            "transport": self._settings.transport,
            "commit_policy": self._settings.commit_policy,
            "fan_out": self._settings.fan_out,
            "read_share": self._settings.read_share,
            "timeout_s": timeout_s,
            "observers": (*self._observers, notes),
        }
        sync = self._connect_sync(group, list(spec.engines), **options)
        if self._on_open is not None:
            self._on_open(group, sync)
        return sync

    def _forget_if_failed(self, pair: Pair, connected: Future[WeightSync]) -> None:
        error = connected.exception()
        if error is not None:
            if not isinstance(error, RdtError):
                logger.error("pair %s could not be connected", pair.spec.name, exc_info=error)
            pair.close()
            with self._lock:
                if self._pairs.get(pair.spec.name) is pair:
                    del self._pairs[pair.spec.name]

    def _forget(self, pair: Pair) -> None:
        with self._lock:
            if self._pairs.get(pair.spec.name) is pair:
                del self._pairs[pair.spec.name]
                self._gone.append(pair.spec.name)
