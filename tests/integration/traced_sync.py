"""One sync with every party in a process of its own that writes its spans. Run by ``test_traces.py``."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import ray

from rdt_core import WeightSync
from tests import spans
from tests.integration.conftest import toy_engine
from tests.integration.toy_trainer import start_trainers
from tests.local_group import wait_for
from tests.local_ray import local_ray

TIMEOUT_S = 120.0


def main() -> None:
    """Sync once, and stay until every span has been written."""
    folder = Path(os.environ[spans.FOLDER])
    with local_ray(tracing_hook="tests.spans:write_to_folder"), toy_engine() as engine:
        trainers = start_trainers(2)
        ray.get([trainer.attach.remote("traced") for trainer in trainers], timeout=TIMEOUT_S)
        with WeightSync.connect("traced", engines=[engine]) as sync:
            ray.get([trainer.publish.remote(1) for trainer in trainers], timeout=TIMEOUT_S)
            sync.update(version=1, verify="digest")
        wait_for(lambda: not spans.missing_names(itertools.chain(*spans.read_folder(folder).values())))


if __name__ == "__main__":
    main()
