"""How a connect chooses, probes and opens its links, seen from the driver, and what it leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from rdt_core import transports
from rdt_core.client import CoordinatorClient
from rdt_core.errors import RdtError, TransportError, TransportLiesError, TransportUnavailableError
from rdt_core.links import Reader, reading_order
from rdt_core.sync import WeightSync
from tests.contract.flawed import RefusesRankOne
from tests.local_group import LocalGroup, local_group, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def group() -> Iterator[LocalGroup]:
    with local_group() as made:
        yield made


def exports_of(group: LocalGroup) -> list[int]:
    """How many exports and probes each trainer rank holds."""
    held = [trainer.publisher._exports for trainer in group.trainers]
    return [len(exports._offers) + len(exports._probes) for exports in held]


def test_connect_and_status_say_what_every_link_uses_and_why(group: LocalGroup) -> None:
    with group.serve_engine() as engine, group.connect(engine) as sync:
        (rank,) = sync.engines[engine]
        assert rank["trainers"] == {"0": "memory", "1": "memory"}
        assert rank["reasons"] == {"0": "forced", "1": "forced"}
        assert rank["probe_s"] > 0
        assert sync.status()["engines"][0]["reasons"] == {0: "forced", 1: "forced"}
        report = sync.update(group.write_and_publish())
        assert report.ranks[0].transports == {0: "memory", 1: "memory"}


def test_ranks_of_one_engine_begin_to_read_from_different_trainer_ranks() -> None:
    def order(engine: str, rank: int, count: int) -> list[int]:
        reader = Reader(engine=engine, rank=rank, device=torch.device("cpu"), forced="memory", timeout_s=1.0)
        return reading_order(reader, range(count))

    for engine in ("http://a", "http://b"):
        orders = [order(engine, rank, 4) for rank in range(4)]
        # At every point of time each trainer rank is read by one of them.
        assert all(sorted(column) == [0, 1, 2, 3] for column in zip(*orders, strict=True))
    assert len({tuple(order(f"http://engine-{n}", 0, 4)) for n in range(16)}) > 1
    assert order("http://a", 3, 0) == []


def test_the_environment_forces_the_transport_of_a_driver_that_names_none(
    group: LocalGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RDT_TRANSPORT", "memory")
    with group.serve_engine() as engine:
        with WeightSync.connect(group.name, [engine], channel=group.channel) as sync:
            assert set(sync.engines[engine][0]["trainers"].values()) == {"memory"}
        monkeypatch.setenv("RDT_TRANSPORT", "pigeon")
        with pytest.raises(TransportUnavailableError, match=r"'pigeon'.*trainer rank 0"):
            WeightSync.connect(group.name, [engine], channel=group.channel)


def test_a_disconnect_makes_trainers_drop_what_they_exported(group: LocalGroup) -> None:
    with group.serve_engine() as engine:
        with group.connect(engine):
            assert exports_of(group) == [1, 1]
        wait_for(lambda: exports_of(group) == [0, 0])


def test_an_engine_that_died_in_its_probe_can_come_back(group: LocalGroup) -> None:
    with group.serve_engine() as engine:
        asked = {"reader": f"{engine}#0", "transport": "memory", "secret": "of the dead", "version": 1}
        CoordinatorClient(group.channel).ask("probe", {0: asked}, 60.0)
        with group.connect(engine) as sync:
            assert sync.update(group.write_and_publish()).num_tensors > 0


def test_a_transport_that_lies_is_refused_at_connect_by_name(
    group: LocalGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(transports._FACTORIES, "memory", "tests.contract.flawed:LiesLikeRayAscend")
    fault = "left its targets as they were"
    with group.serve_engine() as engine, pytest.raises(TransportLiesError, match=fault):
        group.connect(engine)
    wait_for(lambda: exports_of(group) == [0, 0])


def test_a_link_that_cannot_be_opened_leaves_no_other_open(
    group: LocalGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(transports._FACTORIES, "memory", "tests.contract.flawed:RefusesRankOne")
    RefusesRankOne.opened.clear()
    with group.serve_engine() as engine, pytest.raises(RdtError, match="rank 1 cannot be read"):
        group.connect(engine)
    wait_for(lambda: exports_of(group) == [0, 0])
    assert len(RefusesRankOne.opened) == 3
    for link in RefusesRankOne.opened:
        with pytest.raises(TransportError, match="closed"):
            link.pull(1, timeout_s=1.0)
