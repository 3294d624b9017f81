"""vLLM's weight-transfer interface on one worker, carried out by a :class:`WeightSubscriber`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rdt_core import choice, engine_rpc
from rdt_core.errors import NotPreparedError, UnsupportedEngineError
from rdt_core.mode import STAGED
from rdt_core.subscriber import WeightSubscriber
from rdt_vllm import compat
from rdt_vllm.model import VllmModel

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig, WeightTransferConfig


@dataclass
class RdtInitInfo(WeightTransferInitInfo):
    """Body of ``/init_weight_transfer_engine``: which group of trainers to read from.

    Args:
        group: name under which the trainer ranks attached.
        engine: this engine's name among the group's engines; by default vLLM's own instance id.
        ray_address: ``host:port`` of the cluster; empty for ``RAY_ADDRESS``, else the one on this host.
        ray_auth_mode: the driver's ``RAY_AUTH_MODE``; never a token.
        transport: for every link; by default each link chooses.
        timeout_s: for each wait, in seconds.
    """

    group: str
    engine: str = ""
    ray_address: str = ""
    ray_auth_mode: str = ""
    transport: str = choice.AUTO
    timeout_s: float = 60.0


@dataclass
class RdtUpdateInfo(WeightTransferUpdateInfo):
    """Body of ``/update_weights``: the published version to read, and a deadline in seconds."""

    version: int
    timeout_s: float = 60.0


class RdtWeightTransferEngine(WeightTransferEngine[RdtInitInfo, RdtUpdateInfo]):
    """One worker's receiver. vLLM makes it after the model is loaded, when the backend is ``rdt``.

    All methods are called by vLLM from the thread that runs the model, between steps. ``update_weights``
    only reads into landing memory; parameters change in ``finish_weight_update`` and nowhere else, so a
    failed update leaves the old version serving and needs no clean-up.
    """

    init_info_cls = RdtInitInfo
    update_info_cls = RdtUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._model = VllmModel(vllm_config, model, device)
        self._subscriber = WeightSubscriber(self._model)
        self._read: int | None = None

    def call(self, method: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Answer one ``/rdt/*`` control request, errors included. Called by the worker's ``rdt_call``."""
        with set_current_vllm_config(self.vllm_config):
            return engine_rpc.call(self._subscriber, method, payload)

    def note_sleep(self, *, is_asleep: bool) -> None:
        """The memory of the weights is about to go away, or is there again. Called by the worker."""
        self._model.is_asleep = is_asleep
        if is_asleep:
            self._subscriber.reclaim()

    def init_transfer_engine(self, init_info: RdtInitInfo) -> None:
        """Connect to a group. Blocks for seconds; the model is left as it was.

        Raises:
            RdtError: see :meth:`WeightSubscriber.connect`.
        """
        # vLLM's own routes resume generation whether or not an update succeeded, so no update may tear.
        asked = {
            **asdict(init_info),
            "mode": STAGED,
            "engine": init_info.engine or self.vllm_config.instance_id,
        }
        self._read = None
        self._subscriber.connect(engine_rpc.parse_connect(asked))

    def start_weight_update(self) -> None:
        """Forget what an earlier, unfinished update read."""
        self._read = None
        self._subscriber.abort()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Read a version; the reads have ended when this returns, so there is no device to wait for.

        Overrides vLLM's, which synchronizes an accelerator that a CPU engine does not have
        (distributed/weight_transfer/base.py, 0.32).

        Raises:
            RdtError: see :meth:`WeightSubscriber.prepare`.
        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: RdtUpdateInfo) -> None:
        """See :meth:`update_weights`."""
        self._read = None
        version = engine_rpc.parse_version(asdict(update_info))
        self._subscriber.prepare(version, timeout_s=engine_rpc.parse_timeout(asdict(update_info)))
        self._read = version

    def finish_weight_update(self) -> None:
        """Flip the model to what ``update_weights`` read.

        Raises:
            NotPreparedError: no version was read since ``start_weight_update``.
        """
        version, self._read = self._read, None
        if version is None:
            raise NotPreparedError(self._subscriber.version + 1, None)
        self._subscriber.commit(version)

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Nothing sends here: a trainer publishes. vLLM 0.26 asks every backend for this method.

        Raises:
            UnsupportedEngineError: always.
        """
        del iterator, trainer_args
        raise UnsupportedEngineError("vllm", compat.vllm_version(), "sending; use rdt_core.WeightPublisher")

    def shutdown(self) -> None:
        """Leave the group. The worker goes on serving what it has; idempotent."""
        self._read = None
        self._subscriber.disconnect()
