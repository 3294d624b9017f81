"""Weight sync from a live trainer into live inference engines by one-sided reads over Ray.

Nothing heavy is imported here: the pure half (errors, regions, manifests, plans) needs neither torch nor
ray, and the moving half is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rdt_core.errors import RdtError
from rdt_core.manifest import Manifest, Shard, TensorSpec, Window
from rdt_core.plan import Copy, Plan, Read
from rdt_core.region import Region

if TYPE_CHECKING:
    from rdt_core.local_shards import LocalShard, LocalShards
    from rdt_core.publisher import WeightPublisher
    from rdt_core.report import SyncReport
    from rdt_core.subscriber import WeightSubscriber
    from rdt_core.sync import WeightSync

__version__ = "0.1.0"

_LAZY = {
    "LocalShard": "rdt_core.local_shards",
    "LocalShards": "rdt_core.local_shards",
    "SyncReport": "rdt_core.report",
    "WeightPublisher": "rdt_core.publisher",
    "WeightSubscriber": "rdt_core.subscriber",
    "WeightSync": "rdt_core.sync",
}

__all__ = [
    "Copy",
    "LocalShard",
    "LocalShards",
    "Manifest",
    "Plan",
    "RdtError",
    "Read",
    "Region",
    "Shard",
    "SyncReport",
    "TensorSpec",
    "WeightPublisher",
    "WeightSubscriber",
    "WeightSync",
    "Window",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
