"""What the ranks of a world do in the tests of the Megatron-core exporter; each case runs in every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rdt_core.coverage import find_overlap, find_uncovered
from rdt_core.describe import describe_trainer
from rdt_core.errors import UnsupportedLayoutError
from rdt_core.region import Region
from tests.megatron import cpu_shim

cpu_shim.install()

from megatron.core.transformer.moe import experts  # noqa: E402  # Megatron is imported after the shim

from rdt_megatron import megatron_shards  # noqa: E402
from tests.megatron import starcoder2  # noqa: E402
from tests.megatron.configurations import CONFIGURATIONS  # noqa: E402
from tests.megatron.hf_models import hf_config, logits_of  # noqa: E402
from tests.megatron.megatron_models import start_trainer, tokens  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdt_core.local_shards import LocalShards
    from tests.megatron.configurations import Configuration
    from tests.megatron.megatron_models import Trainer

_TOLERANCE = 1e-5
_NUM_STEPS = 3


def export(c: Configuration, trainer: Trainer, hf: Any) -> LocalShards:
    family = starcoder2.FAMILY if c.family == "starcoder2" else None
    return megatron_shards(trainer.chunks, hf, family=family)


def rebuild_before_and_after_training(name: str) -> dict[str, Any]:
    """The description taken before training must give a model of equal logits then and after three steps."""
    c = CONFIGURATIONS[name]
    if c.experts == "stacked" and not hasattr(experts, "GroupedMLP"):
        return {"skipped": "this version of Megatron-core has no GroupedMLP"}
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
        "is_direct": all(shard.data.is_contiguous() for shard in local.shards),
        "dtypes": {shard.spec.name: shard.spec.dtype for shard in local.shards},
        "regions": sorted((shard.spec.name, str(shard.region)) for shard in local.shards),
        "hf_values": {**hf.to_dict(), "dtype": c.dtype},
    }


def an_overlapped_gather_is_incomplete_until_it_is_refreshed() -> dict[str, bool]:
    """Whether replicas agree after a step, before and after ``refresh``."""
    c = CONFIGURATIONS["DP2, distributed optimizer, overlapped gather"]
    hf = hf_config(c)
    trainer = start_trainer(c, hf)
    local = export(c, trainer, hf)
    assert local.refresh is not None
    trainer.train(1)
    before = _replicas_agree(local)
    local.refresh()
    return {"before": before, "after": _replicas_agree(local)}


def _replicas_agree(local: LocalShards) -> bool:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [shard.data.clone() for shard in local.shards])
    first, *others = everywhere
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def without_parameters_that_engines_do_not_load() -> list[str]:
    """Names of the tensors that are left when a pattern is skipped."""
    trainer, hf = _one_rank()
    trainer.bare[0].decoder.layers[1].extra = torch.nn.Parameter(torch.zeros(3))
    local = megatron_shards(trainer.chunks, hf, skip=["decoder.layers.1.extra", "output_layer.*"])
    return [shard.spec.name for shard in local.shards]


def moved_parameters() -> list[str]:
    """Owners of the views whose memory was given up after they were described."""
    trainer, hf = _one_rank()
    local = megatron_shards(trainer.chunks, hf)
    before = local.locate()
    attention = trainer.bare[0].decoder.layers[2].self_attention
    attention.linear_proj.weight.data = attention.linear_proj.weight.data.clone()
    return [s.owner for s, a, b in zip(local.shards, before, local.locate(), strict=True) if a != b]


def refused(reason: str) -> list[Any]:
    """What the exporter said of a model that was spoiled in one way: tensor, rank, reason, remedy."""
    trainer, hf = _one_rank()
    _SPOILERS[reason](trainer.bare[0], hf)
    try:
        megatron_shards(trainer.chunks, hf)
    except UnsupportedLayoutError as error:
        return [error.tensor, error.rank, error.reason, error.remedy]
    raise AssertionError("the exporter described it")


def _one_rank() -> tuple[Trainer, Any]:
    c = CONFIGURATIONS["one rank"]
    hf = hf_config(c)
    return start_trainer(c, hf), hf


class _Quantized(torch.Tensor):
    """Stands for Transformer Engine's quantized tensors: a subclass whose own memory means nothing."""


def _spoil(attribute: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], None]:
    def spoil(model: Any, _: Any) -> None:
        owner = model.decoder.layers[1].mlp.linear_fc2
        value = make(owner.weight.data)
        setattr(owner, attribute, torch.nn.Parameter(value, requires_grad=False))

    return spoil


def _release(model: Any, _: Any) -> None:
    weight = model.decoder.layers[1].mlp.linear_fc2.weight
    weight.data = weight.data.clone()
    weight.untyped_storage().resize_(0)


_SPOILERS: dict[str, Callable[[Any, Any], None]] = {
    "no rule": _spoil("scale", torch.Tensor.clone),
    "meta": _spoil("weight", lambda w: w.to("meta")),
    "integers": _spoil("weight", lambda w: w.to(torch.int8)),
    "quantized": _spoil("weight", lambda w: w.clone().as_subclass(_Quantized)),
    "not contiguous": _spoil("weight", lambda w: w.t().contiguous().t()),
    "another shape": _spoil("weight", lambda w: w[0]),
    "released": _release,
    "untied": lambda _, hf: setattr(hf, "tie_word_embeddings", True),
    "unknown model": lambda _, hf: setattr(hf, "model_type", "gpt9"),
    "zero-centred": lambda model, _: setattr(model.config, "layernorm_zero_centered_gamma", True),
    "another checkpoint": lambda _, hf: setattr(hf, "num_hidden_layers", 5),
}


def _compare(local: LocalShards, trainer: Trainer, hf: Any) -> float:
    """Largest difference between the logits of both models; the same in every rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    pieces = [(shard.spec, shard.region, shard.data.clone()) for shard in local.shards]
    compares_logits = trainer.configuration.compares_logits
    dist.all_gather_object(everywhere, (pieces, trainer.logits() if compares_logits else None))
    result: list[float] = [-1.0]
    if dist.get_rank() == 0:
        tensors = assemble([piece for rank, _ in everywhere for piece in rank])
        expected = logits_of(hf, tensors, tokens(trainer.configuration.vocab, 0))
        found = [logits for _, logits in everywhere if logits is not None]
        assert bool(found) == compares_logits, "no rank has logits"
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
