"""One Ray cluster for all contract tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray cluster of this test process; yields its GCS address."""
    with local_ray() as address:
        yield address
