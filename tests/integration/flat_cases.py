"""What ranks do in the tests of FSDP1; each function runs in every rank."""

from __future__ import annotations

from typing import Any

import torch

from rdt_megatron import fsdp_shards
from rdt_megatron.names import strip_wrappers
from tests.integration.sharded_net import Block, check, make_net, refusal_of, train


def wrap_flat(model: Any, *, use_orig_params: bool = True, **options: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({Block})
    device = torch.device("cpu")
    options = {"auto_wrap_policy": policy, "device_id": device, "use_orig_params": use_orig_params, **options}
    return FullyShardedDataParallel(model, **options)


def _check_flat_over_steps(model: Any) -> dict[str, list[str]]:
    """As ``_check_over_steps``, for FSDP1: a parameter has several boxes, and is gathered by a context."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def full() -> dict[str, torch.Tensor]:
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {strip_wrappers(name): p.detach().clone() for name, p in model.named_parameters()}

    before_steps = full()
    local = fsdp_shards(model)
    check(local, before_steps)
    addresses = local.locate()
    train(model, 3)
    assert local.locate() == addresses == fsdp_shards(model).locate()
    trained = full()
    assert not any(torch.equal(before_steps[name], trained[name]) for name in trained)
    check(local, trained)
    regions: dict[str, list[str]] = {}
    for shard in local.shards:
        regions.setdefault(shard.spec.name, []).append(str(shard.region))
    return regions


def flat_parameters() -> dict[str, list[str]]:
    return _check_flat_over_steps(wrap_flat(make_net()))


def flat_parameters_without_original_ones() -> dict[str, list[str]]:
    return _check_flat_over_steps(wrap_flat(make_net(), use_orig_params=False))


def flat_parameters_kept_whole() -> dict[str, list[str]]:
    from torch.distributed.fsdp import ShardingStrategy

    return _check_flat_over_steps(wrap_flat(make_net(), sharding_strategy=ShardingStrategy.NO_SHARD))


def refuses_offloaded_flat_parameters() -> list[Any]:
    from torch.distributed.fsdp import CPUOffload

    return refusal_of(wrap_flat(make_net(), cpu_offload=CPUOffload(offload_params=True)))
