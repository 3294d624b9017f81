"""Column blocks over a transport that takes rows: no arena, no landing memory in place, every byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from rdt_core import link_plans
from rdt_core.client import LocalChannel
from rdt_core.errors import TornReadError, TransportError, WireFormatError
from rdt_core.export_request import parse_export
from rdt_core.exports import Exports
from rdt_core.row_blocks import Rows
from rdt_core.subscriber import ConnectRequest, WeightSubscriber
from rdt_core.transports.memory import MemoryExport, MemoryLink
from tests.integration.columns import Columns, EngineRank
from tests.integration.toy_trainer import ToyTrainer, values_of

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP = "rows"
SHAPES = {"down.weight": (96, 64), "experts.weight": (3, 40, 128), "norm.weight": (64,)}


class Group:
    """Trainer ranks that cut along one dim, and the ranks of an engine that hold column blocks."""

    def __init__(self, num_trainers: int, dim: int, num_engine_ranks: int) -> None:
        self.channel = LocalChannel(GROUP)
        self.trainers = [ToyTrainer(rank, num_trainers, SHAPES, dim=dim) for rank in range(num_trainers)]
        for trainer in self.trainers:
            trainer.attach(GROUP, self.channel)
        self.models = [
            Columns(SHAPES, rank, num_engine_ranks, torch.float32) for rank in range(num_engine_ranks)
        ]
        self.subscribers = [
            WeightSubscriber(EngineRank(model, rank, num_engine_ranks), channel=self.channel)
            for rank, model in enumerate(self.models)
        ]

    def connect(self, mode: str, **fields: Any) -> list[dict[str, Any]]:
        request = ConnectRequest(group=GROUP, engine="columns", transport="memory", mode=mode, **fields)
        return [subscriber.connect(request) for subscriber in self.subscribers]

    def sync(self, version: int) -> None:
        for trainer in self.trainers:
            trainer.write(version)
            trainer.publish(version)
        for subscriber in self.subscribers:
            subscriber.prepare(version, verify="digest")
            subscriber.commit(version, verify="digest")

    def check(self, version: int) -> None:
        for model in self.models:
            for name, shape in SHAPES.items():
                whole = values_of(name, shape, version, torch.float32)
                assert torch.equal(model.parameter(name), model.part(name, whole)), name

    def close(self) -> None:
        for subscriber in self.subscribers:
            subscriber.disconnect()
        for trainer in self.trainers:
            trainer.close()
        self.channel.end()


CUTS = {"rows into columns": (2, 0, 2), "columns into wider ones": (4, 1, 2), "into narrower ones": (2, 2, 4)}


@pytest.fixture(params=list(CUTS.values()), ids=list(CUTS))
def cut_group(request: pytest.FixtureRequest) -> Iterator[Group]:
    made = Group(*request.param)
    yield made
    made.close()


@pytest.mark.parametrize("mode", ["staged", "inplace"])
def test_every_byte_lands_without_memory_of_the_trainers(cut_group: Group, mode: str) -> None:
    infos = cut_group.connect(mode)
    for version in (1, 2, 3):
        cut_group.sync(version)
        cut_group.check(version)
    assert [info["arena_bytes"] for info in infos] == [0] * len(infos)
    assert [trainer.arena_bytes() for trainer in cut_group.trainers] == [0] * len(cut_group.trainers)
    for info in infos:
        assert info["read_nbytes"] == info["nbytes"]
        assert info["num_reads"] < 40
        assert (info["landing_nbytes"] == 0) == (mode == "inplace")


@pytest.mark.parametrize("mode", ["staged", "inplace"])
def test_paced_reads_cut_rows_where_a_piece_is_full(
    cut_group: Group, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_plans, "piece_nbytes", lambda _: 1000)
    infos = cut_group.connect(mode, read_share=0.9)
    for version in (1, 2):
        cut_group.sync(version)
        cut_group.check(version)
    if mode == "staged":
        assert all(info["num_pieces"] > info["read_nbytes"] // 1000 for info in infos)


def test_a_write_into_rows_that_were_read_is_found_by_digests(
    cut_group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_group.connect("staged")
    cut_group.sync(1)
    for trainer in cut_group.trainers:
        trainer.write(2)
        trainer.publish(2)
    pull = MemoryLink.pull

    def pull_and_write(link: MemoryLink, version: int, *, timeout_s: float) -> None:
        pull(link, version, timeout_s=timeout_s)
        for trainer in cut_group.trainers:
            trainer.write(3)

    monkeypatch.setattr(MemoryLink, "pull", pull_and_write)
    with pytest.raises(TornReadError):
        cut_group.subscribers[0].prepare(2, verify="digest")
    cut_group.check(1)


def test_rows_for_a_transport_that_takes_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exports = Exports({"w": torch.zeros(64, dtype=torch.uint8)}, "cpu", 0)
    transport = exports._transport("memory")
    monkeypatch.setattr(transport, "takes_rows", False)
    asked = {"reader": "r", "transport": "memory", "ranges": [("w", 0, 4, 8, 8)], "arena": [], "pieces": []}
    with pytest.raises(TransportError, match="contiguous ranges only"):
        exports.open(asked)
    exports.close()


@pytest.mark.parametrize(
    "part",
    [
        ("w", 0, 4, 8),
        ("w", 0, 4, 0, 8),
        ("w", 0, 4, 8, 3),
        ("w", 0, 0, 8, 8),
        ("w", 0, 4, 9, 8),
        ("w", 5, 4, 8, 8),
        ("w", 0, 4, -1, 8),
        ("w", 0, 4, True, 8),
        ("w", 0, 4, 2**70, 2**70),
        ("w", 0, 4, 8, 8, 8),
        ("v", 0, 4, 8, 8),
    ],
)
def test_rows_that_are_none_or_reach_out_of_their_window_are_refused(part: tuple[object, ...]) -> None:
    asked = {"reader": "r", "transport": "memory", "arena": [], "pieces": []}
    with pytest.raises(WireFormatError):
        parse_export({**asked, "ranges": [part]}, {"w": 64})
    assert parse_export({**asked, "ranges": [("w", 4, 4, 8, 8)]}, {"w": 64}).ranges == (
        ("w", Rows(4, 4, 8, 8)),
    )


@pytest.mark.parametrize("is_live", [True, False])
def test_a_publish_asks_once_of_every_live_window_and_else_of_every_readers_export(
    is_live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {name: torch.zeros(64, dtype=torch.uint8) for name in ("v", "w")}
    exports = Exports(memory, "cpu", 0)
    monkeypatch.setattr(exports._transport("memory"), "is_live", is_live)
    for reader in ("a", "b", "c"):
        asked = {"transport": "memory", "arena": [], "pieces": []}
        exports.open({**asked, "reader": reader, "ranges": [("v", 0, 8), ("w", 8, 8)]})
    looked: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        MemoryExport,
        "refresh",
        lambda export, version: looked.append((version, *(view.numel() for view in export.views))),
    )
    exports.refresh(5)
    assert looked == ([(5, 64, 64)] if is_live else [(5, 8, 8)] * 3)
    exports.close()
