"""Joining the Ray cluster that trainer, driver and engines share."""

from __future__ import annotations

import os
import random
import socket
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rdt_core import ray_errors
from rdt_core.errors import NoRayClusterError, RayAuthError, TransportUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMESPACE = "rdt"
_PROBE_TIMEOUT_S = 3.0
_LOOK_TIMEOUT_S = 1.0
_HEAD_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
_HEAD_PATIENCE_S = 1_000_000


@dataclass(frozen=True, slots=True)
class RayAddress:
    """How to join a cluster; what a driver tells an engine. Never a token.

    Args:
        address: ``host:port`` of the cluster's GCS, or ``"auto"`` for the one on this host.
        auth_mode: the driver's ``RAY_AUTH_MODE``, or empty when it has none.
    """

    address: str
    auth_mode: str = ""


def current_address() -> RayAddress:
    """Where this process, which has joined, can tell others to join.

    Raises:
        NoRayClusterError: this process has not joined a cluster.
    """
    import ray  # noqa: PLC0415  ray is loaded on first use, not on import

    if not ray.is_initialized():
        raise NoRayClusterError("", "this process has not joined one")
    return RayAddress(ray.get_runtime_context().gcs_address, os.environ.get("RAY_AUTH_MODE", ""))


def is_joined() -> bool:
    """Whether this process is a member of a cluster. Loads nothing."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def is_address_given() -> bool:
    """Whether the environment names the cluster, so that it can be joined before anybody asks."""
    return bool(os.environ.get("RAY_ADDRESS"))


def join(where: RayAddress | None = None) -> None:
    """Make this process a member of the cluster, unless it is one already.

    Callable from a driver, an actor, a torchrun rank or an engine worker. Blocks for 1 to 3 seconds on
    first use; a missing cluster or a wrong token is reported within about 3. A process whose node is gone
    leaves it, which takes 5 seconds, and joins anew.

    Args:
        where: the cluster; by default ``RAY_ADDRESS``, else the one on this host.

    Raises:
        TransportUnavailableError: ray is not installed.
        NoRayClusterError: nothing answers there.
        RayAuthError: the cluster wants another token.
    """
    try:
        import ray  # noqa: PLC0415
    except ImportError as error:
        raise TransportUnavailableError(
            "ray", str(error), "Install it with `pip install 'ray>=2.56'`."
        ) from error
    if ray.is_initialized():
        if is_node_there():
            return
        # Nothing in this process can use a node that is gone; there may be a new cluster.
        ray.shutdown()
    address = (where.address if where else "") or os.environ.get("RAY_ADDRESS", "") or "auto"
    if where and where.auth_mode and "RAY_AUTH_MODE" not in os.environ:
        _adopt_auth_mode(where.auth_mode)
    _check_token_source(address)
    if address != "auto":
        _check_reachable(address)
        _check_token_accepted(address)
    _outlive_head()
    try:
        with _names_of_its_own():
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if "InvalidAuthToken" in str(error):
            raise RayAuthError(address) from error
        raise NoRayClusterError(address, _first_line(error)) from error
    ray_errors.calm(ray._private.worker.global_worker)  # noqa: SLF001  Ray has no public way


@contextmanager
def _names_of_its_own() -> Iterator[None]:
    """Let Ray draw names that no other process draws, and leave this process's random numbers as they were.

    Ray names a process's subscription to the cluster's errors by the module ``random``, and ranks of one
    engine or one trainer are seeded alike. Of two subscriptions of one name each poll ends the other's at
    once: the GCS then answers thousands of polls a second for two ranks, half a core's worth.

    Source: ray/_private/gcs_pubsub.py, ray/_raylet.pyx (2.60).
    """
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


def is_node_there() -> bool:
    """Whether the Ray node that this process has joined still runs. Takes microseconds.

    Asked before every request that may end at the node's raylet: Ray ends a process that asks one which is
    gone (RayletIpcClient, 2.60), and an inference engine must not end with its cluster.
    """
    import ray  # noqa: PLC0415

    node = ray._private.worker._global_node  # noqa: SLF001  Ray has no public way
    path = node.raylet_socket_name if node is not None else None
    if not path:
        return True
    try:
        with socket.socket(socket.AF_UNIX) as look:
            look.settimeout(_LOOK_TIMEOUT_S)
            look.connect(str(path).removeprefix("unix:"))
    except (ConnectionError, FileNotFoundError):
        return False
    except OSError:
        return True  # busy, or of another kind: Ray itself must find out
    return True


def _outlive_head() -> None:
    """Have this process live on when Ray's head is gone for longer than a minute.

    Ray ends it otherwise: an engine that serves, or a torchrun rank that trains. Left as it is where the user
    has set the variable.

    Source: src/ray/rpc/rpc_client, gcs_rpc_server_reconnect_timeout_s (2.60).
    """
    from ray._raylet import Config  # noqa: PLC0415

    if _HEAD_PATIENCE not in os.environ:
        os.environ[_HEAD_PATIENCE] = str(_HEAD_PATIENCE_S)
        Config.initialize("")


def _adopt_auth_mode(mode: str) -> None:
    """Take over the driver's mode. Ray reads the variable when it is imported, so it is told to read again.

    Source: ray/_private/authentication/authentication_token_setup.py, _enable_token_auth (2.60).
    """
    from ray._raylet import Config  # noqa: PLC0415

    os.environ["RAY_AUTH_MODE"] = mode
    Config.initialize("")


def _check_token_source(address: str) -> None:
    # Ray aborts the whole process, an engine worker included, when token mode finds no token to send.
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():
        raise RayAuthError(address)


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_S):
            return
    except (OSError, ValueError) as error:
        raise NoRayClusterError(address, _first_line(error)) from error


def _check_token_accepted(address: str) -> None:
    # ray.init itself retries a refused token for 20 s; one read from the GCS tells at once.
    from ray._raylet import GcsClient  # noqa: PLC0415
    from ray.exceptions import AuthenticationError, RpcError  # noqa: PLC0415

    try:
        GcsClient(address=address).internal_kv_get(b"rdt", namespace=b"rdt", timeout=_PROBE_TIMEOUT_S)
    except AuthenticationError as error:
        raise RayAuthError(address) from error
    except RpcError as error:
        raise NoRayClusterError(address, _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
