"""What a scheduler rank does before its server reports ready, so that a connect finds it done.

Importing Ray and NIXL, joining the cluster and running the model's loader on placeholders take seconds each.
Beside a scheduler that serves they would take its time; before it serves they take nobody's.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from rdt_core import ray_session, settings
from rdt_core.errors import RdtError
from rdt_core.model_thread import BackgroundCall
from rdt_sglang import compat
from rdt_sglang.checkpoint import read_specs

if TYPE_CHECKING:
    from rdt_sglang.model import SglangModel

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 60.0


def get_ready(model: SglangModel, model_path: str, revision: str | None) -> None:
    """Import, join and record. Called in the scheduler's own thread, before it serves.

    Nothing here is needed for the server to serve: what does not work is logged, and the connect, which does
    it again, says what is wrong.

    Args:
        model: whose loader is recorded.
        model_path: what the engine was started from, a folder or a repository.
        revision: of the repository.
    """
    _load_transports()
    # In a thread of its own: on the main one Ray takes over the process's signal handlers.
    joining = BackgroundCall("join", _join_cluster) if ray_session.is_address_given() else None
    _record(model, model_path, revision)
    if joining is not None:
        joining.join(_JOIN_TIMEOUT_S)


def _load_transports() -> None:
    """Import Ray and NIXL. Where one is missing, the connect says so.

    On Ascend NIXL would keep openYuanrong's client out.
    """
    nixl = () if settings.read_data_worker() else ("nixl._api",)
    for module in ("ray", "ray.experimental", *nixl):
        try:
            importlib.import_module(module)
        except ImportError as error:
            logger.debug("%s cannot be imported: %s", module, error)


def _join_cluster() -> dict[str, Any]:
    try:
        ray_session.join()
    except RdtError as error:
        logger.warning("weight sync: the Ray cluster is not joined before the first connect: %s", error)
    return {}


def _record(model: SglangModel, model_path: str, revision: str | None) -> None:
    """Record the loader for the tensors of the engine's own checkpoint, as a trainer most often has them."""
    folder = compat.find_folder(model_path, revision)
    try:
        specs = read_specs(folder) if folder is not None else ()
        if specs:
            model.record(specs)
    except (RdtError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        # A server must start whatever its loader or torch raises here.
        logger.info("weight sync: nothing is recorded before the first connect: %s", error)
