"""Arenas: what is packed and cast on the trainer's side lands as the very bytes that direct reads bring."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rdt_core import link_plans
from rdt_core.arena import ARENA_WINDOW, ArenaItem
from rdt_core.arena_memory import Arenas
from rdt_core.describe import describe_trainer
from rdt_core.errors import WireFormatError
from rdt_core.landing import engine_manifest, make_landing
from rdt_core.local_shards import LocalShard, LocalShards
from rdt_core.manifest import TensorSpec
from rdt_core.planner import ReadCost, build_plan
from rdt_core.recorder import record_loader
from rdt_core.region import Region
from rdt_core.subscriber import ConnectRequest, WeightSubscriber
from tests.integration.columns import Columns, EngineRank
from tests.integration.toy_trainer import start_trainers, values_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rdt_core.describe import Described
    from rdt_core.plan import Plan

TIMEOUT_S = 120.0
CPU = torch.device("cpu")
MIXED = {"down.weight": (96, 64), "o.weight": (64, 128), "norm.weight": (64,)}


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=TIMEOUT_S)


def test_four_column_ranks_in_bf16_read_two_fp32_column_ranks_through_packed_and_cast_arenas(
    ray_cluster: str, group: str
) -> None:
    assert ray_cluster
    trainers = start_trainers(2, shapes=MIXED, dim=1)
    get([trainer.attach.remote(group) for trainer in trainers])
    models = [Columns(MIXED, rank, 4, torch.bfloat16) for rank in range(4)]
    subscribers = [WeightSubscriber(EngineRank(model, rank, 4)) for rank, model in enumerate(models)]
    request = ConnectRequest(group=group, engine="columns")
    infos = [subscriber.connect(request) for subscriber in subscribers]
    matrices = sum(math.prod(shape) for shape in MIXED.values() if len(shape) > 1)
    for info in infos:
        assert info["read_nbytes"] == info["arena_bytes"] == 2 * (matrices // 4 + 64)
    # Each trainer rank holds its half of everything once; the vector's halves are shared by all four readers.
    assert get([trainer.arena_bytes.remote() for trainer in trainers]) == [matrices + 64] * 2
    for version in (1, 2):
        get([trainer.write.remote(version) for trainer in trainers])
        get([trainer.publish.remote(version) for trainer in trainers])
        for subscriber in subscribers:
            subscriber.prepare(version)
            subscriber.commit(version)
        for model in models:
            for name, shape in MIXED.items():
                whole = values_of(name, shape, version, torch.float32).to(torch.bfloat16)
                assert torch.equal(model.parameter(name), model.part(name, whole))
    for subscriber in subscribers:
        assert all(get([trainer.arena_bytes.remote() for trainer in trainers])), "freed under a reader"
        subscriber.disconnect()
    # Trainer ranks learn of the last reader's leave by their next task, which is on its way.
    deadline = time.monotonic() + TIMEOUT_S
    while any(get([trainer.arena_bytes.remote() for trainer in trainers])):
        assert time.monotonic() < deadline, "the arenas outlive their last reader"
    for trainer in trainers:
        ray.kill(trainer)


@pytest.mark.parametrize("arenas", ["auto", "never"])
def test_paced_reads_bring_the_same_bytes_piece_by_piece(
    ray_cluster: str, group: str, arenas: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray_cluster
    monkeypatch.setattr(link_plans, "piece_nbytes", lambda _: 1000)
    trainers = start_trainers(2, shapes=MIXED, dim=1)
    get([trainer.attach.remote(group) for trainer in trainers])
    model = Columns(MIXED, 1, 2, torch.bfloat16)
    subscriber = WeightSubscriber(EngineRank(model, 1, 2))
    request = ConnectRequest(group=group, engine="columns", arenas=arenas, read_share=0.5)
    info = subscriber.connect(request)
    assert info["num_pieces"] > info["read_nbytes"] // 1000
    for version in (1, 2):
        get([trainer.write.remote(version) for trainer in trainers])
        get([trainer.publish.remote(version) for trainer in trainers])
        subscriber.prepare(version, verify="digest")
        subscriber.commit(version)
        for name, shape in MIXED.items():
            whole = values_of(name, shape, version, torch.float32).to(torch.bfloat16)
            assert torch.equal(model.parameter(name), model.part(name, whole))
    subscriber.disconnect()
    for trainer in trainers:
        ray.kill(trainer)


def test_a_trainer_that_lends_no_memory_is_read_as_it_lies(ray_cluster: str, group: str) -> None:
    assert ray_cluster
    trainers = start_trainers(2, shapes=MIXED, dim=1)
    get([trainer.attach.remote(group) for trainer in trainers])
    model = Columns(MIXED, 1, 4, torch.bfloat16)
    subscriber = WeightSubscriber(EngineRank(model, 1, 4))
    info = subscriber.connect(ConnectRequest(group=group, engine="columns", arenas="never"))
    assert info["arena_bytes"] == 0
    get([trainer.write.remote(1) for trainer in trainers])
    get([trainer.publish.remote(1) for trainer in trainers])
    subscriber.prepare(1)
    subscriber.commit(1)
    assert get([trainer.arena_bytes.remote() for trainer in trainers]) == [0, 0]
    for name, shape in MIXED.items():
        whole = values_of(name, shape, 1, torch.float32).to(torch.bfloat16)
        assert torch.equal(model.parameter(name), model.part(name, whole))
    subscriber.disconnect()
    for trainer in trainers:
        ray.kill(trainer)


_DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Described], Columns]:
    """One to three trainer ranks that cut a tensor along either dim, and one column rank that wants it."""
    shape = (draw(st.integers(1, 12)), 4 * draw(st.integers(1, 6)))
    world_size, dim = draw(st.integers(1, 3)), draw(st.integers(0, 1))
    dtype = draw(_DTYPES)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 1e3
    ranks = []
    for rank, part in enumerate(torch.tensor_split(torch.arange(shape[dim]), world_size)):
        if not len(part):
            continue
        first, last = int(part[0]), int(part[-1]) + 1
        region = Region((first, 0), (last, shape[1])) if dim == 0 else Region((0, first), (shape[0], last))
        box = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
        data = whole[box].to(dtype).clone()
        spec = TensorSpec("w", shape, str(dtype).removeprefix("torch."))
        shard = LocalShard(spec=spec, region=region, data=data, owner="w")
        local = LocalShards(rank=rank, world_size=world_size, shards=(shard,), locate=lambda: ())
        ranks.append(describe_trainer(local))
    num_ranks = draw(st.sampled_from((1, 2, 4)))
    return ranks, Columns({"w": shape}, draw(st.integers(0, num_ranks - 1)), num_ranks, draw(_DTYPES))


def pull(plan: Plan, ranks: Sequence[Described], buffer: torch.Tensor) -> int:
    """Carry the reads out as a transport would; returns the bytes of all arenas."""
    arena_bytes = 0
    for described in ranks:
        rank = described.manifest.rank
        arenas = Arenas(described.windows)
        hold = arenas.hold(plan.arenas.get(rank, ()))
        arena_bytes += arenas.nbytes
        for read in plan.reads.get(rank, ()):
            stop = read.offset_bytes + read.nbytes
            source = (
                hold.view(read.offset_bytes, read.nbytes)
                if read.window == ARENA_WINDOW
                else described.windows[read.window][read.offset_bytes : stop]
            )
            buffer[read.landing_offset_bytes : read.landing_offset_bytes + read.nbytes].copy_(source)
        hold.close()
        assert arenas.nbytes == 0
    return arena_bytes


@given(layouts(), st.sampled_from((ReadCost(), ReadCost(per_read_s=1e-3), ReadCost(bytes_per_s=1e6))))
@settings(max_examples=80, deadline=None)
def test_a_plan_with_arenas_brings_the_bytes_that_direct_reads_bring(
    layout: tuple[list[Described], Columns], cost: ReadCost
) -> None:
    ranks, model = layout
    specs = {"w": ranks[0].manifest.tensors["w"]}
    recording = record_loader(model, list(specs.values()))
    wanted = engine_manifest(recording, specs, rank=0, world_size=1, node="here", device="cpu")
    landed = []
    for prices in (cost, ReadCost(arenas="never")):
        plan = build_plan(wanted, [described.manifest for described in ranks], cost=prices)
        landing = make_landing(plan, recording, specs, CPU)
        model.parameter("w").fill_(float("nan"))
        assert pull(plan, ranks, landing.buffer) == plan.arena_bytes
        landing.fill_parameters()
        landed.append(model.parameter("w").clone())
    assert not landed[0].isnan().any()
    assert torch.equal(*landed)


def rows(start: int, stop: int, dtype: str = "bfloat16") -> ArenaItem:
    """Rows of a window of eight fp32 numbers a row."""
    return ArenaItem("w", 32 * start, (stop - start, 8), (32, 4), "float32", dtype)


@pytest.fixture
def window() -> torch.Tensor:
    return torch.arange(80, dtype=torch.float32)


@pytest.fixture
def arenas(window: torch.Tensor) -> Arenas:
    return Arenas({"w": window.view(torch.uint8)})


def test_readers_of_equal_items_share_memory_that_goes_with_the_last_of_them(arenas: Arenas) -> None:
    one = arenas.hold([rows(0, 2), rows(2, 3)])
    assert arenas.nbytes == 48
    other = arenas.hold([rows(2, 3), rows(4, 6)])
    assert arenas.nbytes == 48 + 32
    assert one.view(32, 16).data_ptr() == other.view(0, 16).data_ptr()
    one.close()
    one.close()
    assert arenas.nbytes == 48 + 32, "the other reader still reads an item of the first buffer"
    other.close()
    assert arenas.nbytes == 0


def test_a_refresh_brings_what_the_trainer_wrote_since(arenas: Arenas, window: torch.Tensor) -> None:
    hold = arenas.hold([rows(1, 2), rows(1, 2, "float32")])
    window.mul_(2)
    assert hold.view(0, 16).view(torch.bfloat16).tolist() == list(range(8, 16))
    arenas.refresh()
    assert hold.view(0, 16).view(torch.bfloat16).tolist() == list(range(16, 32, 2))
    assert hold.view(16, 32).view(torch.float32).tolist() == list(range(16, 32, 2))


@pytest.mark.parametrize(
    "item",
    [
        rows(8, 11),
        ArenaItem("other", 0, (1,), (4,), "float32", "bfloat16"),
        ArenaItem("w", -4, (1,), (4,), "float32", "bfloat16"),
        ArenaItem("w", 2, (1,), (4,), "float32", "bfloat16"),
        ArenaItem("w", 32, (2,), (-4,), "float32", "bfloat16"),
    ],
)
def test_an_item_outside_of_the_ranks_memory_is_refused_and_nothing_is_held(
    arenas: Arenas, item: ArenaItem
) -> None:
    with pytest.raises(WireFormatError, match="does not lie"):
        arenas.hold([rows(0, 1), item])
    assert arenas.nbytes == 0


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 33), (16, 32), (-1, 1), (0, -1)])
def test_a_range_that_is_not_inside_of_one_item_is_refused(arenas: Arenas, offset: int, nbytes: int) -> None:
    hold = arenas.hold([rows(0, 2), rows(2, 3)])
    with pytest.raises(WireFormatError, match="not inside of one item"):
        hold.view(offset, nbytes)
