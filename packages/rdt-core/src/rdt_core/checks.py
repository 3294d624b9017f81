"""What a machine needs so that weights can sync, looked at piece by piece. Each check changes nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rdt_core import ray_session
from rdt_core.errors import NoRayClusterError, RayAuthError, RdtError, TransportUnavailableError
from rdt_core.transports import TRANSPORTS, make_transport

if TYPE_CHECKING:
    from collections.abc import Iterator

OK, MISSING, NOTE = "ok", "missing", "note"

_INSTALL = {
    "ray": "pip install 'rdt-core[ray]'",
    "nixl": "pip install 'rdt-core[nixl]'",
    "torch": "pip install torch",
}
_ADAPTERS = {"vllm": "rdt-vllm", "sglang": "rdt-sglang", "megatron-core": "rdt-megatron"}
_SHM_NEEDED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Args:
        name: of the thing.
        state: ``ok``, ``missing`` (a sync cannot work without it) or ``note`` (it can, but know this).
        detail: what was found.
        remedy: the command or setting that helps; empty when nothing is to do.
    """

    name: str
    state: str
    detail: str
    remedy: str = ""


def run_checks() -> Iterator[Check]:
    """Every check, in the order in which a person would repair. Joining Ray takes a few seconds."""
    yield Check("python", OK, f"{platform.python_version()} on {platform.machine()}")
    yield from map(_check_needed, _INSTALL)
    yield from _check_adapters()
    yield _check_token()
    cluster = _check_cluster()
    yield cluster
    for name in TRANSPORTS:
        if name == "nixl" and cluster.state != OK:
            # Its agent belongs to Ray, which would start a cluster of its own, or wait for one.
            yield _check_nixl_installed()
        elif name != "memory":
            yield _check_transport(name)
    yield _check_shared_memory()
    yield _check_rdma()


def find_version(distribution: str) -> str | None:
    """Version of an installed distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_needed(name: str) -> Check:
    version = find_version(name)
    if version is None and importlib.util.find_spec(name) is None:
        return Check(name, MISSING, "not installed", _INSTALL[name])
    return Check(name, OK, version or "installed")


def _check_adapters() -> Iterator[Check]:
    for framework, adapter in _ADAPTERS.items():
        version = find_version(framework)
        if version is None:
            continue
        has_adapter = find_version(adapter) is not None
        detail = f"{version}, with {adapter}" if has_adapter else f"{version}, without {adapter}"
        state, remedy = (OK, "") if has_adapter else (NOTE, f"pip install {adapter}")
        yield Check(framework, state, detail, remedy)


def _check_token() -> Check:
    """Which token mode this process would join Ray with. Never shows a token."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() != "token":
        return Check("ray token", OK, f"RAY_AUTH_MODE is {mode or 'not set: Ray decides by its version'}")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Check("ray token", OK, "token mode, token from RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        return Check(
            "ray token", MISSING, f"token mode, but there is no file {path}", "ray get-auth-token --generate"
        )
    if path.stat().st_mode & 0o077:
        return Check("ray token", NOTE, f"token mode, and others may read {path}", f"chmod 600 {path}")
    return Check("ray token", OK, f"token mode, token from {path}")


def _check_cluster() -> Check:
    if importlib.util.find_spec("ray") is None:
        return Check("ray cluster", MISSING, "cannot look for one without ray", _INSTALL["ray"])
    try:
        ray_session.join()
        return Check("ray cluster", OK, f"joined {ray_session.current_address().address}")
    except NoRayClusterError as error:
        return Check("ray cluster", NOTE, f"none found: {error.reason}", "ray start --head")
    except RayAuthError as error:
        remedy = "the same RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH in every process"
        return Check("ray cluster", MISSING, f"{error.address} refused this process's token", remedy)
    except RdtError as error:
        return Check("ray cluster", MISSING, str(error), _INSTALL["ray"])


def _check_transport(name: str) -> Check:
    label = f"transport {name}"
    try:
        make_transport(name)
    except TransportUnavailableError as error:
        return Check(label, NOTE, error.reason, error.remedy)
    except ImportError as error:
        return Check(label, NOTE, str(error), _INSTALL["torch"])
    return Check(label, OK, "works in this process")


def _check_nixl_installed() -> Check:
    try:
        # Not nixl alone: a platform's wheel has no such module, and that is the usual mistake.
        importlib.import_module("nixl._api")
    except ImportError as error:
        return Check("transport nixl", NOTE, str(error), _INSTALL["nixl"])
    return Check("transport nixl", NOTE, "installed; not tried, since no Ray cluster was joined")


def _check_shared_memory() -> Check:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0  # noqa: S108  Ray keeps objects there
    detail = f"{free / 1e9:.1f} GB free in /dev/shm"
    if free < _SHM_NEEDED_BYTES:
        return Check("shared memory", NOTE, detail, "give the container more: docker run --shm-size=8g")
    return Check("shared memory", OK, detail)


def _check_rdma() -> Check:
    folder = Path("/sys/class/infiniband")
    devices = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if devices:
        return Check("rdma", OK, ", ".join(devices))
    return Check("rdma", NOTE, "no RDMA device: between nodes NIXL goes over TCP, at a fraction of the speed")
