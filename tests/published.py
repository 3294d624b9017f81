"""Waits until a group's coordinator knows of a publish, which trainer ranks do not wait for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdt_core import WeightSync

TIMEOUT_S = 30.0


def wait_known(sync: WeightSync, version: int) -> None:
    """Until every trainer rank's publish of ``version`` has arrived. A test that kills a rank asks first."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(trainer["version"] != version for trainer in sync.status()["trainers"].values()):
        assert time.monotonic() < deadline, sync.status()
