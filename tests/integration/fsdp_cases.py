"""What the ranks of a world do in the tests of the FSDP2 exporter; each function runs in every rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from rdt_megatron import fsdp_shards
from tests.integration.sharded_net import (
    Net,
    check,
    check_over_steps,
    gather,
    make_net,
    refusal_of,
    shard_fully,
    train,
)


def even_and_uneven_rows() -> dict[str, Any]:
    model = make_net()
    return check_over_steps(shard_fully(model, model.blocks))


def hsdp() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = make_net()
    return check_over_steps(shard_fully(model, model.blocks, mesh=mesh))


def shards_of_dim_one() -> dict[str, Any]:
    model = make_net(width=8, inner=16, vocab=12)
    placement = lambda p: Shard(1) if p.dim() == 2 else None  # noqa: E731
    return check_over_steps(shard_fully(model, model.blocks, shard_placement_fn=placement))


def tensor_parallel_under_fsdp() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = make_net(width=8, inner=20)
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model = shard_fully(model, model.blocks, mesh=mesh["dp"])
    local = fsdp_shards(model)
    return check(local, gather(model))


def bfloat16() -> dict[str, Any]:
    model = make_net().to(torch.bfloat16)
    local = fsdp_shards(shard_fully(model, model.blocks))
    train(model, 1)
    check(local, gather(model))
    return {shard.spec.name: shard.spec.dtype for shard in local.shards}


def mixed_precision() -> dict[str, Any]:
    model = make_net()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    check_over_steps(shard_fully(model, model.blocks, mp_policy=policy))
    return {shard.spec.name: shard.spec.dtype for shard in fsdp_shards(model).shards}


def tied_and_frozen() -> dict[str, Any]:
    model = make_net()
    model.head.weight = model.embed.weight
    model.blocks[0].up.weight.requires_grad_(False)
    local = fsdp_shards(shard_fully(model, model.blocks))
    train(model, 2)
    return check(local, gather(model))


def root_left_unsharded() -> dict[str, Any]:
    """After an evaluation FSDP keeps the root gathered; neither the address nor a later attach may differ."""
    model = make_net()
    shard_fully(model, model.blocks)
    before = fsdp_shards(model)
    addresses = before.locate()
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    assert not isinstance(model.head.weight, DTensor), "the root is sharded, so this tests nothing"
    assert before.locate() == addresses
    assert not isinstance(model.head.weight, DTensor), "locate changed the model's state"
    after = fsdp_shards(model)
    assert after.locate() == addresses
    train(model, 1)
    assert after.locate() == addresses
    return check(after, gather(model))


def kept_after_forward() -> dict[str, Any]:
    model = make_net()
    return check_over_steps(shard_fully(model, model.blocks, reshard_after_forward=False))


def smaller_mesh_after_forward() -> dict[str, Any]:
    model = make_net()
    shard_fully(model, model.blocks, reshard_after_forward=2)
    local = fsdp_shards(model)
    addresses = local.locate()
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    assert local.locate() == addresses
    assert fsdp_shards(model).locate() == addresses
    return check(local, gather(model))


def wrapped_layers() -> dict[str, Any]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_net()
    expected = set(gather(model))
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    compiled: Any = torch.compile(shard_fully(model, model.blocks))
    return {"same": {s.spec.name for s in fsdp_shards(compiled).shards} <= expected}


def ignored_parameters() -> dict[str, Any]:
    model = make_net()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model, ignored_params={model.head.weight})
    return check(fsdp_shards(model), gather(model))


def moved_by_assign() -> list[str]:
    """Names of the parameters whose address changed."""
    model = make_net()
    shard_fully(model, model.blocks)
    local = fsdp_shards(model)
    before = local.locate()
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "embed.weight"}
    model.load_state_dict(state, strict=False, assign=True)
    moved = [s for s, a, b in zip(local.shards, before, local.locate(), strict=True) if a != b]
    return [shard.owner for shard in moved]


def moved_within_its_dtensor() -> list[str]:
    """The same, where the parameter is the one that was described and its local tensor another."""
    model = make_net()
    shard_fully(model, model.blocks)
    local = fsdp_shards(model)
    before = local.locate()
    weight: Any = model.head.weight
    kept, weight._local_tensor = weight._local_tensor, weight._local_tensor.clone()
    moved = [s for s, a, b in zip(local.shards, before, local.locate(), strict=True) if a != b]
    assert kept.data_ptr() in before
    return [shard.owner for shard in moved]


def renamed() -> list[str]:
    model = make_net()
    shard_fully(model, model.blocks)
    return [shard.spec.name for shard in fsdp_shards(model, names=lambda name: f"model.{name}").shards]


def refuses_meta() -> list[Any]:
    with torch.device("meta"):
        model = make_net()
    return refusal_of(shard_fully(model, model.blocks))


def refuses_integers() -> list[Any]:
    model = make_net()
    model.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    return refusal_of(shard_fully(model, model.blocks))


def refuses_eight_bit_floats() -> list[Any]:
    model = make_net()
    model.scaled = nn.Parameter(torch.zeros(4).to(torch.float8_e4m3fn), requires_grad=False)
    return refusal_of(model)


def refuses_released_memory() -> list[Any]:
    model = make_net()
    model.blocks[0].up.weight.untyped_storage().resize_(0)
    return refusal_of(model)


def refuses_offloaded_shards() -> list[Any]:
    """What CPUOffloadPolicy leaves between steps: a shard in the host's memory, of a mesh of GPUs."""
    mesh = DeviceMesh("cuda", [0, 1], _init_backend=False, _rank=dist.get_rank())
    model = nn.Linear(4, 4)
    spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(torch.Size((8, 4)), (4, 1), torch.float32))
    make: Any = DTensor  # which torch does not annotate
    shard = make(torch.zeros(4, 4), spec, requires_grad=False)
    model.offloaded = nn.Parameter(shard, requires_grad=False)
    return refusal_of(model)


def refuses_separate_runs() -> list[Any]:
    """10 rows, strided by 2 over 2 ranks: rank 0 would hold rows 0-2 and 5-7."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2,))
    local = torch.zeros(6 if dist.get_rank() == 0 else 4, 3)
    tensor = DTensor.from_local(
        local,
        mesh,
        [_StridedShard(0, split_factor=2)],
        run_check=False,
        shape=torch.Size((10, 3)),
        stride=(3, 1),
    )
    model = nn.Linear(1, 1)
    model.rows = nn.Parameter(tensor)
    return refusal_of(model)


def distributed_data_parallel() -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    model: Any = DistributedDataParallel(make_net())
    expected = set(gather(model.module))
    local = fsdp_shards(model)
    addresses = local.locate()
    train(model, 3)
    assert local.locate() == addresses
    regions = check(local, gather(model.module))
    assert set(regions) == expected
    return regions


def uneven_tensor_parallel_under_fsdp() -> dict[str, Any]:
    """13 rows over 2 x 2: tensor parallelism cuts 7 and 6, fully_shard cuts these."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model: Any = nn.Sequential(nn.Linear(3, 13, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(39.0).reshape(13, 3))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    local = fsdp_shards(fully_shard(model, mesh=mesh["dp"]))
    return check(local, {"0.weight": torch.arange(39.0).reshape(13, 3)})


def attach_memory() -> dict[str, int]:
    """Growth of resident memory while a model is described, in bytes, by the model's size in bytes."""
    fsdp_shards(shard_fully(make_net(), []))
    return {str(nbytes): growth for nbytes, growth in map(_growth, (32, 2048))}


def _growth(width: int) -> tuple[int, int]:
    model = Net(width=width, inner=2 * width)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    shard_fully(model, model.blocks)
    before = _resident_bytes()
    local = fsdp_shards(model)
    local.locate()
    return nbytes, _resident_bytes() - before


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
