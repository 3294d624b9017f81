"""What the ranks of a world do in the tests of the Megatron-core exporter; each case runs in every rank.

Every name of ``configurations.CONFIGURATIONS`` is a case: train, and rebuild the transformers model from
nothing but the exported views.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rdt_core.coverage import find_overlap, find_uncovered
from rdt_core.describe import describe_trainer
from rdt_core.region import Region
from tests.megatron import cpu_shim

cpu_shim.install()

from rdt_megatron import megatron_shards  # noqa: E402  # Megatron is imported after the shim
from tests.megatron import starcoder2  # noqa: E402
from tests.megatron.configurations import CONFIGURATIONS  # noqa: E402
from tests.megatron.hf_models import hf_config, logits_of  # noqa: E402
from tests.megatron.megatron_models import start_trainer, tokens  # noqa: E402

if TYPE_CHECKING:
    from rdt_core.local_shards import LocalShards
    from tests.megatron.configurations import Configuration
    from tests.megatron.megatron_models import Trainer

_TOLERANCE = 1e-5
_NUM_STEPS = 3


def __getattr__(name: str) -> Any:
    if name in CONFIGURATIONS:
        return partial(_rebuild_before_and_after_training, CONFIGURATIONS[name])
    raise AttributeError(name)


def export(c: Configuration, trainer: Trainer, hf: Any) -> LocalShards:
    family = starcoder2.FAMILY if c.family == "starcoder2" else None
    return megatron_shards(trainer.chunks, hf, family=family)


def _rebuild_before_and_after_training(c: Configuration) -> dict[str, Any]:
    """The description taken before training must give a model of equal logits then and after three steps."""
    torch.manual_seed(0)
    hf = hf_config(c)
    trainer = start_trainer(c, hf)
    local = export(c, trainer, hf)
    addresses = local.locate()
    assert addresses == tuple(shard.data.data_ptr() for shard in local.shards)
    before = [shard.data.clone() for shard in local.shards]
    differences = [_compare(local, trainer, hf)]
    if c.runs:
        trainer.train(_NUM_STEPS)
    if local.refresh is not None:
        local.refresh()
    assert local.locate() == addresses, "memory moved while training"
    unchanged = {s.spec.name for s, old in zip(local.shards, before, strict=True) if torch.equal(s.data, old)}
    differences.append(_compare(local, trainer, hf))
    manifest = describe_trainer(local).manifest
    return {
        "differences": differences,
        "unchanged": sorted(unchanged) if c.runs else [],
        "num_windows": len(manifest.windows),
        "num_shards": len(local.shards),
        "dtypes": {shard.spec.name: shard.spec.dtype for shard in local.shards},
        "regions": sorted((shard.spec.name, str(shard.region)) for shard in local.shards),
        "hf_values": {**hf.to_dict(), "dtype": c.dtype},
    }


def _compare(local: LocalShards, trainer: Trainer, hf: Any) -> float:
    """Largest difference between the logits of both models; the same in every rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    pieces = [(shard.spec, shard.region, shard.data.clone()) for shard in local.shards]
    dist.all_gather_object(everywhere, (pieces, trainer.logits() if trainer.configuration.runs else None))
    result: list[float] = [-1.0]
    if dist.get_rank() == 0:
        tensors = assemble([piece for rank, _ in everywhere for piece in rank])
        expected = logits_of(hf, tensors, tokens(trainer.configuration.vocab, 0))
        found = [logits for _, logits in everywhere if logits is not None]
        assert bool(found) == trainer.configuration.runs, "no rank has logits"
        result = [max((float((logits - expected).abs().max()) for logits in found), default=0.0)]
    dist.broadcast_object_list(result, src=0)
    assert result[0] < _TOLERANCE, f"logits differ by {result[0]}"
    return result[0]


def assemble(pieces: list[tuple[Any, Region, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Checkpoint tensors from regions that cover them exactly; replicas must be equal."""
    tensors: dict[str, torch.Tensor] = {}
    held: dict[str, dict[Region, torch.Tensor]] = {}
    specs: dict[str, Any] = {}
    for spec, region, data in pieces:
        assert data.shape == region.shape
        assert specs.setdefault(spec.name, spec) == spec, "ranks disagree about a tensor"
        replica = held.setdefault(spec.name, {}).setdefault(region, data)
        assert torch.equal(replica, data), f"replicas of {spec.name}{region} differ"
    for name, regions in held.items():
        assert find_overlap(sorted(regions, key=lambda region: region.start)) is None, name
        assert find_uncovered(Region.whole(specs[name].shape), list(regions)) is None, name
        whole = torch.empty(specs[name].shape, dtype=next(iter(regions.values())).dtype)
        for region, data in regions.items():
            whole[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))] = data
        tensors[name] = whole
    return tensors
