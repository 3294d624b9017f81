"""The door through which SGLang finds this package, and the ``--weight-sync`` flag it adds.

SGLang logs and swallows whatever a plugin raises while it is loaded, and goes on to serve without it. So
:func:`register` only adds the flag; everything else is put in place by :func:`activate` when the flag is
given, outside of SGLang's loading of plugins, and checked there: what cannot be put in place ends the start.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rdt_core.errors import ConfigError, RdtError
from rdt_sglang import compat

if TYPE_CHECKING:
    import argparse

BACKEND = compat.BACKEND


def register() -> None:
    """Offer ``--weight-sync rdt``, and ``weight_sync="rdt"`` to :class:`sglang.Engine`.

    SGLang calls this in most of its processes, before CUDA is used; calling it again changes nothing. A
    server that is started without the flag keeps its routes, messages and scheduler. Starts nothing.
    """
    compat.hook_server_args(_add_flag, _from_flag)
    compat.hook_engine_arguments(_from_keyword)


def activate() -> None:
    """Put this adapter into the running process. Called in each process of a server; idempotent.

    Raises:
        UnsupportedEngineError: this SGLang has no place for a part of it.
    """
    compat.offer_messages()
    if compat.is_frontend():
        compat.offer_routes(_attach_routes)
    if compat.is_scheduler():
        compat.offer_receiver(_attach_receiver)


class WeightSyncChoice:
    """Rides in the server's arguments to every process, and activates this adapter where it arrives.

    SGLang does not load plugins in all of its processes (Ray actors, further tokenizer workers), but all of
    them get the arguments.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return (_arrive, ())


def _arrive() -> WeightSyncChoice:
    _activate_or_exit()
    return WeightSyncChoice()


def _activate_or_exit() -> None:
    try:
        activate()
    except RdtError as error:
        sys.exit(f"error: --weight-sync {BACKEND}: {error}")


def _add_flag(result: object, parser: argparse.ArgumentParser) -> None:
    del result
    group = parser.add_argument_group("weight sync", "Weight sync from a live trainer (rdt-sglang).")
    group.add_argument(
        "--weight-sync",
        choices=[BACKEND],
        default=None,
        help="Read weights one-sidedly from a live trainer. Opens the routes /rdt/* and "
        "/update_weights_from_rdt, guarded by the admin API key, else the API key, where the server has one.",
    )


def _from_flag(server_args: Any, cls: type, args: argparse.Namespace) -> None:
    del cls
    if getattr(args, "weight_sync", None) == BACKEND:
        try:
            _choose(server_args)
        except RdtError as error:
            sys.exit(f"error: --weight-sync rdt: {error}")


def _from_keyword(server_args: Any, weight_sync: object) -> None:
    if weight_sync is None:
        return
    if weight_sync != BACKEND:
        raise ConfigError(f"weight_sync must be {BACKEND!r} or None, got {weight_sync!r}.")
    _choose(server_args)


def _choose(server_args: Any) -> None:
    compat.check_supported(server_args)
    activate()
    compat.mark(server_args, WeightSyncChoice())


def _attach_routes(tokenizer_manager: Any) -> None:
    if compat.is_chosen(tokenizer_manager.server_args):
        from rdt_sglang.routes import attach  # noqa: PLC0415  where there is a server only

        attach(tokenizer_manager)


def _attach_receiver(scheduler: Any) -> None:
    if compat.is_chosen(scheduler.server_args):
        from rdt_sglang.engine import SchedulerReceiver  # noqa: PLC0415  in the scheduler's process only

        compat.handle_messages(scheduler, SchedulerReceiver(scheduler).handle)
