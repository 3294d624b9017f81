"""A Ray cluster for tests: local, loopback, its own temp dir, ended by whoever started it."""

from __future__ import annotations

import contextlib
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


CALL_TIMEOUT_S = 120.0


@contextlib.contextmanager
def local_ray(
    *,
    num_gpus: int | None = None,
    tracing_hook: str | None = None,
    below: str | None = None,
    metrics_port: int | None = None,
) -> Iterator[str]:
    """Start a cluster, join it, and yield its GCS address.

    Args:
        num_gpus: that are counted, or only named.
        tracing_hook: ``"module:function"`` that every process of the cluster calls when it starts.
        below: the folder for its files; a short path.
        metrics_port: where Ray's agent, if what it needs is installed, exports metrics twice a second.
    """
    import ray

    # Ray keeps sockets below its temp dir, whose paths must stay short.
    below = below or "/tmp"  # noqa: S108  a folder with a random name is made there
    with tempfile.TemporaryDirectory(prefix="rdt", dir=below, ignore_cleanup_errors=True) as temp_dir:
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            namespace="rdt",
            _temp_dir=temp_dir,
            _tracing_startup_hook=tracing_hook,
            _metrics_export_port=metrics_port,
            _system_config={"metrics_report_interval_ms": 500} if metrics_port else None,
        )
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()
