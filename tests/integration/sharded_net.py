"""The small model that ranks shard in the tests of the exporters, and how they check what is exported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rdt_core.coverage import find_overlap, find_uncovered
from rdt_core.errors import UnsupportedLayoutError
from rdt_core.region import Region
from rdt_megatron import fsdp_shards

if TYPE_CHECKING:
    from rdt_core.local_shards import LocalShards

_WIDTH = 6


class Block(nn.Module):
    """A residual MLP whose row counts no world size of the tests divides."""

    def __init__(self, width: int = _WIDTH, inner: int = 14) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    """Embedding, two blocks, a head; 10 rows over 4 ranks give 3, 3, 3, 1, and 3 rows leave a rank empty."""

    def __init__(self, width: int = _WIDTH, inner: int = 14, vocab: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Block(width, inner) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(width, vocab, bias=False)
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x * self.scale.mean())
        return out


def make_net(**kwargs: int) -> Any:
    torch.manual_seed(1)
    return Net(**kwargs)


def shard_fully(model: Any, layers: Any, **options: Any) -> Any:
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(model: nn.Module, num_steps: int, vocab: int = 10, data_rank: int | None = None) -> None:
    # One by one: parameters on different meshes cannot be updated together.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
    generator = torch.Generator().manual_seed(dist.get_rank() if data_rank is None else data_rank)
    for _ in range(num_steps):
        out = model(torch.randint(vocab, (2, 5), generator=generator))
        getattr(out, "logits", out).float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def gather(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def slice_of(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]


def check(local: LocalShards, full: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every view equals its region of the gathered tensor, and all ranks together hold all of it."""
    assert (local.rank, local.world_size) == (dist.get_rank(), dist.get_world_size())
    assert local.locate() == tuple(shard.data.data_ptr() for shard in local.shards)
    for shard in local.shards:
        assert shard.region.num_elements, f"{shard.spec.name} is empty"
        assert shard.spec.shape == tuple(full[shard.spec.name].shape)
        assert torch.equal(shard.data, slice_of(full[shard.spec.name], shard.region)), shard.spec.name
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [(s.spec.name, s.region) for s in local.shards])
    for name, tensor in full.items():
        held = {region for rank in everywhere for other, region in rank if other == name}
        assert find_overlap(sorted(held, key=lambda region: region.start)) is None, name
        assert find_uncovered(Region.whole(tensor.shape), list(held)) is None, name
    assert {name for rank in everywhere for name, _ in rank} == set(full)
    return {shard.spec.name: str(shard.region) for shard in local.shards}


def check_over_steps(model: nn.Module) -> dict[str, Any]:
    """The description taken before training holds after it."""
    local = fsdp_shards(model)
    regions = check(local, gather(model))
    before = [shard.data.clone() for shard in local.shards]
    addresses = local.locate()
    train(model, 3)
    assert local.locate() == addresses
    assert check(local, gather(model)) == regions
    changed = [not torch.equal(a, shard.data) for a, shard in zip(before, local.shards, strict=True)]
    assert all(changed), "some views do not show what the optimizer wrote"
    return regions


def refusal_of(model: nn.Module) -> list[Any]:
    try:
        fsdp_shards(model)
    except UnsupportedLayoutError as error:
        return [error.tensor, error.rank == dist.get_rank(), error.reason, error.remedy]
    raise AssertionError("the exporter described it")
