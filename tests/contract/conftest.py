"""What contract tests share: one Ray cluster, and a sync group inside this process a module."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from rdt_core import transports
from rdt_core.client import LocalChannel
from tests.contract import gated
from tests.contract.world import GROUP, Clock, TrainerRank, World, make_world
from tests.data_workers import data_workers, find_obstacle
from tests.local_ray import local_ray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.data_workers import DataWorker


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray cluster of this test process; yields its GCS address."""
    with local_ray() as address:
        yield address


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        # Before the ranks attach, since a manifest says which transports a rank offers.
        patch.setitem(transports._FACTORIES, gated.NAME, "tests.contract.gated:GatedTransport")
        world = make_world()
        yield world
        world.close()


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """Two attached trainer ranks, and a gated transport for their readers."""
    gated.reset()
    yield shared_world
    gated.reset()


@pytest.fixture
def clock() -> Clock:
    """Of a coordinator in this process that a test has to itself."""
    return Clock()


@pytest.fixture
def lost_world(clock: Clock) -> World:
    """Two trainer ranks and a coordinator, for a test that has them die: see ``count_anew``."""
    channel = LocalChannel(GROUP, clock)
    return World(channel, [TrainerRank(channel, rank, 2) for rank in range(2)])


@pytest.fixture(scope="session")
def two_data_workers() -> Iterator[list[DataWorker]]:
    """Two openYuanrong data workers, which stand for those of a trainer's node and of an engine's."""
    obstacle = find_obstacle()
    if "nixl._api" in sys.modules:
        obstacle = "this process has loaded NIXL: run these alone, pytest -m yr"
    if obstacle is not None:
        pytest.skip(obstacle)
    with data_workers(2) as workers:
        yield workers
