"""What the tests of both engines share: tiny checkpoints and a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A tiny checkpoint by family and seed, made on first use."""
    from tests.e2e.tiny_models import save_checkpoint

    made: dict[tuple[str, int], Path] = {}

    def find(family: str, seed: int) -> Path:
        if (family, seed) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{seed}")
            made[family, seed] = save_checkpoint(family, seed, folder)
        return made[family, seed]

    return find


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A local Ray cluster of this test process; yields its GCS address. SGLang's actors ask for a GPU."""
    with local_ray(num_gpus=1) as address:
        yield address
