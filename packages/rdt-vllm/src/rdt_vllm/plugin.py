"""The door through which vLLM finds this package, and the ``--weight-sync`` flag it adds."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rdt_vllm import compat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BACKEND = compat.BACKEND
MIDDLEWARE = "rdt_vllm.routes.WeightSyncMiddleware"


def register() -> None:
    """Offer ``--weight-sync rdt`` and the weight-transfer backend ``rdt``.

    vLLM calls this in each of its processes, before CUDA is used; calling it again changes nothing. An
    engine that is started without them keeps its layouts, routes and loaders. Does not block; reads
    nothing and starts nothing.
    """
    compat.offer_backend("rdt_vllm.engine", "RdtWeightTransferEngine")
    if "vllm.engine.arg_utils" in sys.modules:
        _offer_flag()
        compat.watch_workers()
    elif "vllm.v1.worker.worker_base" in sys.modules:
        compat.watch_workers()
    if "vllm.v1.engine.core" in sys.modules:
        compat.offer_flip()


def _offer_flag() -> None:
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415  loaded already, or there is no flag to add

    if not getattr(EngineArgs.add_cli_args, "offers_weight_sync", False):
        EngineArgs.add_cli_args = staticmethod(_with_flag(EngineArgs.add_cli_args))


def _with_flag(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def add_with_flag(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_cli_args(parser)
        if compat.find_option(parser, "--weight-sync") is None:
            _add_flag(parser)
        return parser

    add_with_flag.offers_weight_sync = True  # type: ignore[attr-defined]  # marks our wrapper
    return add_with_flag


def _add_flag(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("WeightSync", "Weight sync from a live trainer (rdt-vllm).")
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--weight-sync",
        action=_ChooseBackend,
        choices=[BACKEND],
        default=None,
        help="Read weights one-sidedly from a live trainer. Opens the routes /rdt/* and vLLM's weight-update "
        "routes, guarded by the server's API key where it has one.",
    )
    compat.exclude(exclusive, compat.find_option(parser, "--weight-transfer-config"))


class _ChooseBackend(argparse.Action):
    """Sets what ``--weight-transfer-config`` and ``--middleware`` would, in the process that parses."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from vllm.config import WeightTransferConfig  # noqa: PLC0415  only when the flag is given

        del parser, option_string
        setattr(namespace, self.dest, values)
        namespace.weight_transfer_config = WeightTransferConfig(backend=str(values))
        # A core that is forked from this process loads no plugins of its own.
        compat.offer_flip()
        present = list(getattr(namespace, "middleware", None) or [])
        if MIDDLEWARE not in present:
            namespace.middleware = [*present, MIDDLEWARE]
