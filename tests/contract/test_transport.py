"""What every transport promises. The memory fake and NIXL over real Ray processes take the same tests."""

from __future__ import annotations

import gc
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from rdt_core import transports
from rdt_core.errors import SourceDiedError, TransportError, TransportUnavailableError
from rdt_core.link_prices import cost_over
from rdt_core.row_blocks import Rows
from rdt_core.row_views import view_rows
from rdt_core.transports import known_transports, make_transport
from tests.contract.sources import ActorSource, LocalSource, device_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rdt_core.transports.base import Transport
    from tests.contract.sources import Source

SIZES = (5, 4096, 1)
TIMEOUT_S = 30.0


@dataclass
class Stand:
    """A transport on the reader's side and a way to make sources for it."""

    transport: Transport
    make_source: Callable[[Sequence[int]], Source]

    def make_targets(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Memory of the kind that this transport reads into, filled with 255."""
        device = device_of(self.transport.name)
        return [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")


@pytest.fixture(
    params=[
        "memory",
        "nixl",
        pytest.param("yr", marks=pytest.mark.yr),
        pytest.param("cuda_ipc", marks=[pytest.mark.cuda, needs_gpu]),
    ],
)
def stand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """One transport; real ones have their source in another process, and the data system in another node."""
    source_env: dict[str, str] = {}
    if request.param == "yr":
        near, far = request.getfixturevalue("two_data_workers")
        source_env = far.env
        for name, value in near.env.items():
            monkeypatch.setenv(name, value)
    transport = make_transport(request.param) if request.param == "memory" else None
    if transport is None:
        request.getfixturevalue("ray_cluster")
        transport = make_transport(request.param)
    made: list[Source] = []

    def make_source(sizes: Sequence[int]) -> Source:
        source: Source
        if request.param == "memory":
            source = LocalSource(transport, sizes)
        else:
            source = ActorSource(request.param, sizes, source_env)
        made.append(source)
        return source

    yield Stand(transport, make_source)
    for source in made:
        source.kill()


def test_a_pull_brings_every_byte_into_the_targets_own_memory(stand: Stand) -> None:
    source = stand.make_source(SIZES)
    source.write(0, [1, 2, 3, 4, 5])
    source.write(1, [i % 251 for i in range(4096)])
    source.write(2, [9])
    targets = stand.make_targets(SIZES)
    addresses = [target.data_ptr() for target in targets]
    link = stand.transport.open(source.export(), targets, trainer_rank=0)
    link.pull(0, timeout_s=TIMEOUT_S)
    assert targets[0].tolist() == [1, 2, 3, 4, 5]
    assert targets[1].tolist() == [i % 251 for i in range(4096)]
    assert targets[2].tolist() == [9]
    assert [target.data_ptr() for target in targets] == addresses
    link.close()


def test_targets_may_be_slices_of_one_buffer_and_nothing_beside_them_is_touched(stand: Stand) -> None:
    source = stand.make_source((4, 8))
    source.write(0, [1, 2, 3, 4])
    source.write(1, [5, 6, 7, 8, 9, 10, 11, 12])
    (buffer,) = stand.make_targets((32,))
    link = stand.transport.open(source.export(), [buffer[2:6], buffer[16:24]], trainer_rank=0)
    link.pull(0, timeout_s=TIMEOUT_S)
    wanted = [255] * 2 + [1, 2, 3, 4] + [255] * 10 + [5, 6, 7, 8, 9, 10, 11, 12] + [255] * 8
    assert buffer.tolist() == wanted
    link.close()


def test_one_link_brings_every_version_of_the_source(stand: Stand) -> None:
    source = stand.make_source((3,))
    targets = stand.make_targets((3,))
    link = stand.transport.open(source.export(), targets, trainer_rank=0)
    for version in range(1, 6):
        source.write(0, [version, version + 1, version + 2])
        source.publish(version)
        link.pull(version, timeout_s=TIMEOUT_S)
        assert targets[0].tolist() == [version, version + 1, version + 2]
    link.close()


def test_a_link_opened_after_a_version_was_published_brings_that_version(stand: Stand) -> None:
    source = stand.make_source((3,))
    source.write(0, [1, 2, 3])
    source.publish(7)
    targets = stand.make_targets((3,))
    link = stand.transport.open(source.export(), targets, trainer_rank=0)
    link.pull(7, timeout_s=TIMEOUT_S)
    assert targets[0].tolist() == [1, 2, 3]
    link.close()


def test_two_readers_of_one_source_do_not_disturb_each_other(stand: Stand) -> None:
    source = stand.make_source((2,))
    source.write(0, [7, 8])
    first, second = stand.make_targets((2,)), stand.make_targets((2,))
    links = [stand.transport.open(source.export(), targets, trainer_rank=0) for targets in (first, second)]
    links[0].pull(0, timeout_s=TIMEOUT_S)
    links[0].close()
    assert second[0].tolist() == [255, 255]
    links[1].pull(0, timeout_s=TIMEOUT_S)
    assert first[0].tolist() == second[0].tolist() == [7, 8]
    links[1].close()


def test_a_dead_source_is_a_typed_error_that_names_its_rank(stand: Stand) -> None:
    source = stand.make_source((2,))
    link = stand.transport.open(source.export(), stand.make_targets((2,)), trainer_rank=3)
    link.pull(0, timeout_s=TIMEOUT_S)
    source.kill()
    # A snapshot may outlive its source, so ask for a version that cannot have been published.
    with pytest.raises(SourceDiedError, match="trainer rank 3"):
        link.pull(1, timeout_s=TIMEOUT_S)
    link.close()


def test_targets_that_nobody_else_holds_any_more_are_still_read_into(stand: Stand) -> None:
    source = stand.make_source((4,))
    source.write(0, [1, 2, 3, 4])
    (buffer,) = stand.make_targets((8,))
    link = stand.transport.open(source.export(), [buffer[2:6]], trainer_rank=0)
    gc.collect()
    link.pull(0, timeout_s=TIMEOUT_S)
    assert buffer.tolist() == [255, 255, 1, 2, 3, 4, 255, 255]
    link.close()


def test_targets_of_other_sizes_than_the_export_are_refused(stand: Stand) -> None:
    source = stand.make_source((4,))
    ticket = source.export()
    with pytest.raises(TransportError):
        stand.transport.open(ticket, stand.make_targets((3,)), trainer_rank=0).pull(0, timeout_s=TIMEOUT_S)


def test_a_closed_link_refuses_to_pull_and_closes_again_quietly(stand: Stand) -> None:
    source = stand.make_source((4,))
    link = stand.transport.open(source.export(), stand.make_targets((4,)), trainer_rank=0)
    link.close()
    link.close()
    with pytest.raises(TransportError, match="closed"):
        link.pull(0, timeout_s=TIMEOUT_S)


def test_registered_memory_takes_what_one_link_after_the_other_brings(stand: Stand) -> None:
    source = stand.make_source((4,))
    source.write(0, [1, 2, 3, 4])
    targets = stand.make_targets((4,))
    registered = stand.transport.register(targets)
    for _ in range(2):
        targets[0].fill_(255)
        link = stand.transport.open(source.export(), targets, trainer_rank=0)
        link.pull(0, timeout_s=TIMEOUT_S)
        link.close()
        assert targets[0].tolist() == [1, 2, 3, 4]
    registered.close()
    registered.close()


def test_rows_come_from_where_they_lie_to_where_they_are_to_lie(stand: Stand) -> None:
    if not stand.transport.takes_rows:
        pytest.skip(f"{stand.transport.name} takes contiguous ranges only; no plan has rows for it")
    source = stand.make_source((4096, 64))
    source.write(0, [at % 251 for at in range(4096)])
    source.write(1, list(range(64)))
    places = [Rows(5, 24, 60, 64), Rows(3, 50)]
    dense, wide = stand.make_targets((24 * 60, 100))
    link = stand.transport.open(
        source.export(places), [view_rows(dense, Rows(0, 24, 60, 24)), wide[10:60]], trainer_rank=0
    )
    link.pull(0, timeout_s=TIMEOUT_S)
    assert dense.tolist() == [(5 + 64 * row + at) % 251 for row in range(60) for at in range(24)]
    assert wide.tolist() == [255] * 10 + list(range(3, 53)) + [255] * 40
    link.close()
    (wide,) = stand.make_targets((64 * 60,))
    link = stand.transport.open(
        source.export([places[0], Rows(0, 0)]),
        [view_rows(wide, Rows(1, 24, 60, 33)), wide[:0]],
        trainer_rank=0,
    )
    link.pull(0, timeout_s=TIMEOUT_S)
    wanted = [255] * (64 * 60)
    for row in range(60):
        wanted[1 + 33 * row : 25 + 33 * row] = [(5 + 64 * row + at) % 251 for at in range(24)]
    assert wide.tolist() == wanted
    link.close()


def test_targets_of_other_rows_than_the_export_are_refused(stand: Stand) -> None:
    if not stand.transport.takes_rows:
        pytest.skip(f"{stand.transport.name} takes contiguous ranges only; no plan has rows for it")
    ticket = stand.make_source((64,)).export([Rows(0, 4, 8, 8)])
    (target,) = stand.make_targets((64,))
    for other in (Rows(0, 8, 4, 8), Rows(0, 32)):
        with pytest.raises(TransportError, match="same plan"):
            stand.transport.open(ticket, [view_rows(target, other)], trainer_rank=0)


def test_a_ticket_of_another_kind_is_refused(stand: Stand) -> None:
    with pytest.raises(TransportError, match="not a ticket"):
        stand.transport.open("ticket", stand.make_targets((1,)), trainer_rank=0)


def test_an_unknown_transport_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TransportUnavailableError, match="nixl"):
        make_transport("carrier-pigeon")


def test_a_plan_has_rows_for_transports_that_take_them_and_for_no_others() -> None:
    names = known_transports()
    cost = cost_over(dict(enumerate(names)), "auto")
    for rank, name in enumerate(names):
        module, _, transport = transports._FACTORIES[name].partition(":")
        taken = getattr(importlib.import_module(module), transport).takes_rows
        assert cost.of(rank).takes_rows is taken
