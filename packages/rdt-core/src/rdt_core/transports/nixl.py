"""NIXL through Ray's public tensor-transport API: RDMA across nodes, shared address space on one.

Facts that shape this file (Ray 2.60): a ref put with ``_tensor_transport="nixl"`` is a window onto live
memory and can be got again and again; targets set for a ref are held weakly, and a target that has gone is
silently replaced by a fresh buffer, so the link keeps them and compares addresses after every pull; the
first use from two threads builds two agents that do not know each other's registrations, so the agent is
built under a lock.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, cast

from rdt_core.errors import (
    PullTimeoutError,
    SourceDiedError,
    TransportError,
    TransportUnavailableError,
)
from rdt_core.ray_session import is_node_there
from rdt_core.transports.huge_pages import back_with_huge_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

PROGRESS_DELAY_US = 1000

_agent_lock = threading.Lock()


def _check_installed() -> None:
    # nixl._api, not nixl: a platform wheel alone (nixl-cu12) gives neither, and that is the usual mistake.
    for module, command in (("ray", "pip install 'ray>=2.56'"), ("nixl._api", "pip install nixl")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise TransportUnavailableError(
                "nixl", f"{module} cannot be imported ({error})", f"Install it with `{command}`."
            ) from error


class _PatientBindings:
    """nixl's bindings, but an agent made through them sleeps between two looks of its progress thread.

    nixl's Python API fixes that delay at 0: the thread spins, and an idle agent burns most of a core in every
    trainer rank and every engine worker. Without the thread, a reader that needs the source to answer its
    first message waits for ever. A millisecond costs 1.5 % of a core and no measurable time in a pull.

    Source: nixl/_api.py, nixl_agent.__init__ (1.5.1).
    """

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def nixlAgent(self, name: str, config: Any) -> Any:  # noqa: N802  the name that nixl calls
        config.pthrDelay = PROGRESS_DELAY_US
        return self._bindings.nixlAgent(name, config)


def _build_agent() -> None:
    """Create this process's NIXL agent, once, before any other use."""
    from nixl._api import nixl_agent  # noqa: PLC0415  ray and nixl are loaded on first use, not on import
    from ray.experimental.rdt.util import get_tensor_transport_manager  # noqa: PLC0415

    with _agent_lock:
        api: Any = sys.modules[nixl_agent.__module__]
        bindings, api.nixlBind = api.nixlBind, _PatientBindings(api.nixlBind)
        try:
            get_tensor_transport_manager("NIXL").get_nixl_agent()
        except Exception as error:  # nixl's own errors have no common base
            raise TransportUnavailableError(
                "nixl", f"its agent cannot be created: {error}", "Check the nixl installation."
            ) from error
        finally:
            api.nixlBind = bindings


def _forget_source_actor(ref: Any) -> None:
    """Make a ref put inside an actor look like one put by a driver, for whoever unpickles it.

    A ref put in an actor carries the actor's handle, and unpickling a handle imports the actor's class: the
    coordinator and every engine would import the trainer's module, or fail because they cannot. The handle
    serves only to free the object from another process; here the putting process owns it.

    Source: ray/experimental/rdt/rdt_manager.py, RDTManager.put_object and free_object_primary_copy (2.60).
    """
    import ray  # noqa: PLC0415
    from ray.experimental.rdt.rdt_manager import RDTSource  # noqa: PLC0415

    manager = ray._private.worker.global_worker.rdt_manager  # noqa: SLF001  Ray has no public way
    with manager._lock:  # noqa: SLF001
        known = manager._managed_rdt_metadata  # noqa: SLF001
        known[ref.hex()] = known[ref.hex()]._replace(src_actor=RDTSource.DRIVER)


def _register(views: Sequence[torch.Tensor]) -> contextlib.ExitStack:
    """Register the views' storages, once more where they are; closing it takes that back."""
    from ray.experimental import deregister_nixl_memory, register_nixl_memory  # noqa: PLC0415

    with contextlib.ExitStack() as registered:
        for view in views:
            register_nixl_memory(view)
            registered.callback(deregister_nixl_memory, view)
        return registered.pop_all()


class NixlExport:
    """See :class:`rdt_core.transports.base.Export`. The ticket is a list that holds one Ray object ref."""

    def __init__(self, views: Sequence[torch.Tensor]) -> None:
        import ray  # noqa: PLC0415

        # Before the registration, which pins pages where there is an RDMA device.
        back_with_huge_pages(views)
        self._registered = _register(views)
        # A bare ref in a call would be resolved to its value on the way; inside a list it stays a ref.
        ref = ray.put(list(views), _tensor_transport="nixl")
        _forget_source_actor(ref)
        self.ticket: list[Any] = [ref]

    def refresh(self, version: int) -> None:
        """Nothing: readers see the memory itself."""

    def close(self) -> None:
        """Drop the ref and the registrations."""
        self.ticket.clear()
        self._registered.close()


def _release_transfer(error: BaseException | None) -> None:
    """Have Ray release a failed transfer's handle now, in this thread, and not when Python collects it.

    The handle hangs on a local variable in the traceback. Collected later, when its trainer's agent has been
    forgotten, it crashed the engine in ``nixlAgent::releaseXferReq`` (Ray 2.60, nixl 1.5.1).

    Source: ray/experimental/rdt/nixl_tensor_transport.py, NixlFetchRequest.__del__ (2.60).
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class NixlLink:
    """See :class:`rdt_core.transports.base.Link`."""

    def __init__(self, ref: object, targets: Sequence[torch.Tensor], trainer_rank: int) -> None:
        from ray.experimental import set_target_for_ref  # noqa: PLC0415

        self._ref: object | None = ref
        self._targets = list(targets)
        self._addresses = [target.data_ptr() for target in self._targets]
        self._trainer_rank = trainer_rank
        self._registered = _register(self._targets)
        set_target_for_ref(cast("Any", ref), self._targets)

    def pull(self, version: int, *, timeout_s: float) -> None:
        """Read the export into the targets; blocks in ``ray.get``."""
        import ray  # noqa: PLC0415
        from ray import exceptions  # noqa: PLC0415

        del version
        if self._ref is None:
            raise TransportError("this link has been closed. Open the ticket again.")
        if not is_node_there():
            raise SourceDiedError(self._trainer_rank, "the Ray node of this process has ended")
        begin = time.monotonic()
        try:
            got = ray.get(cast("Any", self._ref), timeout=timeout_s)
        except BaseException as error:
            # Whatever it is, Ctrl-C too: what Ray collects later may take the process with it.
            _release_transfer(error)
            # Ray's own limit, RAY_rdt_fetch_fail_timeout_milliseconds, may be the shorter one.
            if isinstance(error, (exceptions.GetTimeoutError, exceptions.ObjectFetchTimedOutError)):
                raise PullTimeoutError(self._trainer_rank, time.monotonic() - begin) from None
            if isinstance(error, (exceptions.RayDirectTransportError, exceptions.ObjectLostError)):
                raise SourceDiedError(self._trainer_rank, type(error).__name__) from error
            if isinstance(error, ValueError):
                raise TransportError(f"Ray refused the targets: {error}") from error
            raise
        if [tensor.data_ptr() for tensor in got] != self._addresses:
            raise TransportError(
                f"Ray brought the bytes of trainer rank {self._trainer_rank} into other memory than the "
                "targets. Nothing was committed; report this with your Ray version."
            )

    def close(self) -> None:
        """Drop the ref and the registrations."""
        self._ref = None
        self._targets = []
        self._registered.close()


class NixlTransport:
    """See :class:`rdt_core.transports.base.Transport`.

    Raises:
        TransportUnavailableError: ray or nixl is missing, or no agent can be created.
    """

    name = "nixl"
    takes_rows = False
    is_live = True

    def __init__(self) -> None:
        _check_installed()
        _build_agent()

    def register(self, views: Sequence[torch.Tensor]) -> contextlib.ExitStack:
        """Register the views' storages."""
        return _register(views)

    def export(self, views: Sequence[torch.Tensor]) -> NixlExport:
        """Register the views' storages and put one ref to all of them."""
        return NixlExport(views)

    def open(self, ticket: object, targets: Sequence[torch.Tensor], *, trainer_rank: int) -> NixlLink:
        """Register the targets and set them for the ref."""
        if not isinstance(ticket, list) or len(ticket) != 1:
            raise TransportError(f"{ticket!r} is not a ticket of the nixl transport.")
        return NixlLink(ticket[0], targets, trainer_rank)
