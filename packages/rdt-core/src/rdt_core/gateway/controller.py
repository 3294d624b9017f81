"""The gateway for Python callers: the methods of AReaL's controller, in the caller's own process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rdt_core.errors import DeadlineError, NotConnectedError
from rdt_core.gateway.pair import PairSpec
from rdt_core.gateway.pairs import Pairs
from rdt_core.gateway.settings import GatewaySettings
from rdt_core.sync import WeightSync

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from types import TracebackType
    from typing import TypeVar

    from rdt_core.gateway.pair import UpdateResult
    from rdt_core.observer import SyncObserver

    _T = TypeVar("_T")

_MARGIN_S = 60.0
_CLOSE_TIMEOUT_S = 60.0


class WeightUpdateController:
    """Connects one pair, updates it and disconnects it, in this process. Methods block; call from one thread.

    The same objects as behind the gateway's routes: an update is idempotent by version, an error is raised
    with its type, and trainers that are driven over HTTP are attached and torn down.

    Args:
        settings: keys, deadlines, transport; its address is not used.
        observers: are told about every sync.
        connect: makes the driver.
    """

    def __init__(
        self,
        settings: GatewaySettings | None = None,
        *,
        observers: Sequence[SyncObserver] = (),
        connect: Callable[..., WeightSync] = WeightSync.connect,
    ) -> None:
        self._settings = settings or GatewaySettings()
        self._pairs = Pairs(self._settings, observers, connect=connect)
        self._pair_name = ""

    @property
    def pair_name(self) -> str:
        """The connected pair; empty when there is none."""
        return self._pair_name

    def connect(
        self,
        pair_name: str,
        *,
        inference_worker_urls: Sequence[str],
        group: str = "",
        train_worker_urls: Sequence[str] = (),
    ) -> None:
        """Bring trainers and engines together.

        Args:
            pair_name: the caller's name for it.
            inference_worker_urls: engine servers.
            group: the sync group, where the trainers attach by themselves.
            train_worker_urls: the trainers' own apps, one a rank, where they are driven over HTTP.

        Raises:
            RdtError: as for :meth:`rdt_core.sync.WeightSync.connect`; nothing stays connected.
            TrainerWorkerError: a trainer's routes refused or did not answer.
        """
        spec = PairSpec(
            name=pair_name,
            group=group or ("" if train_worker_urls else self._settings.group),
            engines=tuple(url.rstrip("/") for url in inference_worker_urls),
            trainer_workers=tuple(url.rstrip("/") for url in train_worker_urls),
        )
        pair = self._pairs.connect(spec)
        _wait(pair.connected, f"pair {pair_name!r} to connect", 2 * self._settings.init_timeout_s)
        self._pair_name = pair_name

    def update_weights(
        self, version: int, *, mode: str | None = None, kv_cache: str = "recompute", timeout_s: float = 0.0
    ) -> UpdateResult:
        """Bring every engine to ``version``; asked again for it, the first result is given.

        Args:
            version: the trainer's step.
            mode: as for :meth:`rdt_core.sync.WeightSync.update`.
            kv_cache: as for :meth:`rdt_core.sync.WeightSync.update`.
            timeout_s: for each phase; by default the settings' ``update_timeout_s``.

        Raises:
            NotConnectedError: connect first.
            RdtError: as for :meth:`rdt_core.sync.WeightSync.update`; the old version serves.
        """
        if not self._pair_name:
            raise NotConnectedError("update")
        phase_s = timeout_s or self._settings.update_timeout_s
        pair = self._pairs.find(self._pair_name)
        update = pair.update(version, mode=mode, kv_cache=kv_cache, timeout_s=phase_s)
        return _wait(update, f"the update to version {version}", 4 * phase_s)

    def disconnect(self) -> None:
        """Release the engines and the trainers' workers. Idempotent."""
        if not self._pair_name:
            return
        closing = self._pairs.disconnect(self._pair_name)
        if closing is not None:
            _wait(closing, f"pair {self._pair_name!r} to disconnect", _CLOSE_TIMEOUT_S)
        self._pair_name = ""

    def destroy(self) -> None:
        """The same, whatever is still under way, up to a deadline. Idempotent."""
        self._pairs.close(_CLOSE_TIMEOUT_S)
        self._pair_name = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()


def _wait(future: Future[_T], what: str, timeout_s: float) -> _T:
    """The pair's thread has deadlines of its own; this one is behind them, with a margin."""
    try:
        return future.result(timeout_s + _MARGIN_S)
    except TimeoutError:
        remedy = "Look for a stopped engine or Ray node."
        raise DeadlineError(what, timeout_s + _MARGIN_S, remedy) from None
