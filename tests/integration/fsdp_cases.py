"""What the ranks of a world do in the tests of the FSDP2 exporter; each function runs in every rank."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from rdt_core.coverage import find_overlap, find_uncovered
from rdt_core.errors import UnsupportedLayoutError
from rdt_core.region import Region
from rdt_megatron import fsdp_shards
from rdt_megatron.names import strip_wrappers

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


def _net(**kwargs: int) -> Any:
    torch.manual_seed(1)
    return Net(**kwargs)


def _sharded(model: Any, layers: Any, **options: Any) -> Any:
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def _train(model: nn.Module, num_steps: int, vocab: int = 10, data_rank: int | None = None) -> None:
    # One by one: parameters on different meshes cannot be updated together.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
    generator = torch.Generator().manual_seed(dist.get_rank() if data_rank is None else data_rank)
    for _ in range(num_steps):
        out = model(torch.randint(vocab, (2, 5), generator=generator))
        getattr(out, "logits", out).float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _full(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def _slice(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]


def _check(local: LocalShards, full: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every view equals its region of the gathered tensor, and all ranks together hold all of it."""
    assert (local.rank, local.world_size) == (dist.get_rank(), dist.get_world_size())
    assert local.locate() == tuple(shard.data.data_ptr() for shard in local.shards)
    for shard in local.shards:
        assert shard.region.num_elements, f"{shard.spec.name} is empty"
        assert shard.spec.shape == tuple(full[shard.spec.name].shape)
        assert torch.equal(shard.data, _slice(full[shard.spec.name], shard.region)), shard.spec.name
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [(s.spec.name, s.region) for s in local.shards])
    for name, tensor in full.items():
        held = {region for rank in everywhere for other, region in rank if other == name}
        assert find_overlap(sorted(held, key=lambda region: region.start)) is None, name
        assert find_uncovered(Region.whole(tensor.shape), list(held)) is None, name
    assert {name for rank in everywhere for name, _ in rank} == set(full)
    return {shard.spec.name: str(shard.region) for shard in local.shards}


def _check_over_steps(model: nn.Module) -> dict[str, Any]:
    """The description taken before training holds after it."""
    local = fsdp_shards(model)
    regions = _check(local, _full(model))
    before = [shard.data.clone() for shard in local.shards]
    addresses = local.locate()
    _train(model, 3)
    assert local.locate() == addresses
    assert _check(local, _full(model)) == regions
    changed = [not torch.equal(a, shard.data) for a, shard in zip(before, local.shards, strict=True)]
    assert all(changed), "some views do not show what the optimizer wrote"
    return regions


def even_and_uneven_rows() -> dict[str, Any]:
    model = _net()
    return _check_over_steps(_sharded(model, model.blocks))


def hsdp() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = _net()
    return _check_over_steps(_sharded(model, model.blocks, mesh=mesh))


def shards_of_dim_one() -> dict[str, Any]:
    model = _net(width=8, inner=16, vocab=12)
    placement = lambda p: Shard(1) if p.dim() == 2 else None  # noqa: E731
    return _check_over_steps(_sharded(model, model.blocks, shard_placement_fn=placement))


def tensor_parallel_under_fsdp() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = _net(width=8, inner=20)
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model = _sharded(model, model.blocks, mesh=mesh["dp"])
    local = fsdp_shards(model)
    return _check(local, _full(model))


def bfloat16() -> dict[str, Any]:
    model = _net().to(torch.bfloat16)
    local = fsdp_shards(_sharded(model, model.blocks))
    _train(model, 1)
    _check(local, _full(model))
    return {shard.spec.name: shard.spec.dtype for shard in local.shards}


def mixed_precision() -> dict[str, Any]:
    model = _net()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _check_over_steps(_sharded(model, model.blocks, mp_policy=policy))
    return {shard.spec.name: shard.spec.dtype for shard in fsdp_shards(model).shards}


def tied_and_frozen() -> dict[str, Any]:
    model = _net()
    model.head.weight = model.embed.weight
    model.blocks[0].up.weight.requires_grad_(False)
    local = fsdp_shards(_sharded(model, model.blocks))
    _train(model, 2)
    return _check(local, _full(model))


def root_left_unsharded() -> dict[str, Any]:
    """After an evaluation FSDP keeps the root gathered; neither the address nor a later attach may differ."""
    model = _net()
    _sharded(model, model.blocks)
    before = fsdp_shards(model)
    addresses = before.locate()
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    assert not isinstance(model.head.weight, DTensor), "the root is sharded, so this tests nothing"
    assert before.locate() == addresses
    assert not isinstance(model.head.weight, DTensor), "locate changed the model's state"
    after = fsdp_shards(model)
    assert after.locate() == addresses
    _train(model, 1)
    assert after.locate() == addresses
    return _check(after, _full(model))


def kept_after_forward() -> dict[str, Any]:
    model = _net()
    return _check_over_steps(_sharded(model, model.blocks, reshard_after_forward=False))


def smaller_mesh_after_forward() -> dict[str, Any]:
    model = _net()
    _sharded(model, model.blocks, reshard_after_forward=2)
    local = fsdp_shards(model)
    addresses = local.locate()
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    assert local.locate() == addresses
    assert fsdp_shards(model).locate() == addresses
    return _check(local, _full(model))


def wrapped_layers() -> dict[str, Any]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = _net()
    expected = set(_full(model))
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    compiled: Any = torch.compile(_sharded(model, model.blocks))
    return {"same": {s.spec.name for s in fsdp_shards(compiled).shards} <= expected}


def ignored_parameters() -> dict[str, Any]:
    model = _net()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model, ignored_params={model.head.weight})
    return _check(fsdp_shards(model), _full(model))


def moved_by_assign() -> list[str]:
    """Names of the parameters whose address changed."""
    model = _net()
    _sharded(model, model.blocks)
    local = fsdp_shards(model)
    before = local.locate()
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "embed.weight"}
    model.load_state_dict(state, strict=False, assign=True)
    moved = [s for s, a, b in zip(local.shards, before, local.locate(), strict=True) if a != b]
    return [shard.owner for shard in moved]


def renamed() -> list[str]:
    model = _net()
    _sharded(model, model.blocks)
    return [shard.spec.name for shard in fsdp_shards(model, names=lambda name: f"model.{name}").shards]


def _refused(model: nn.Module) -> list[Any]:
    try:
        fsdp_shards(model)
    except UnsupportedLayoutError as error:
        return [error.tensor, error.rank == dist.get_rank(), error.reason, error.remedy]
    raise AssertionError("the exporter described it")


def refuses_meta() -> list[Any]:
    with torch.device("meta"):
        model = _net()
    return _refused(_sharded(model, model.blocks))


def refuses_integers() -> list[Any]:
    model = _net()
    model.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    return _refused(_sharded(model, model.blocks))


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
    return _refused(model)


def _flat(model: Any, *, use_orig_params: bool = True, **options: Any) -> Any:
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
    _check(local, before_steps)
    addresses = local.locate()
    _train(model, 3)
    assert local.locate() == addresses == fsdp_shards(model).locate()
    trained = full()
    assert not any(torch.equal(before_steps[name], trained[name]) for name in trained)
    _check(local, trained)
    regions: dict[str, list[str]] = {}
    for shard in local.shards:
        regions.setdefault(shard.spec.name, []).append(str(shard.region))
    return regions


def flat_parameters() -> dict[str, list[str]]:
    return _check_flat_over_steps(_flat(_net()))


def flat_parameters_without_original_ones() -> dict[str, list[str]]:
    return _check_flat_over_steps(_flat(_net(), use_orig_params=False))


def flat_parameters_kept_whole() -> dict[str, list[str]]:
    from torch.distributed.fsdp import ShardingStrategy

    return _check_flat_over_steps(_flat(_net(), sharding_strategy=ShardingStrategy.NO_SHARD))


def refuses_offloaded_flat_parameters() -> list[Any]:
    from torch.distributed.fsdp import CPUOffload

    return _refused(_flat(_net(), cpu_offload=CPUOffload(offload_params=True)))


def distributed_data_parallel() -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    model: Any = DistributedDataParallel(_net())
    expected = set(_full(model.module))
    local = fsdp_shards(model)
    addresses = local.locate()
    _train(model, 3)
    assert local.locate() == addresses
    regions = _check(local, _full(model.module))
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
    return _check(local, {"0.weight": torch.arange(39.0).reshape(13, 3)})


def attach_memory() -> dict[str, int]:
    """Growth of resident memory while a model is described, in bytes, by the model's size in bytes."""
    fsdp_shards(_sharded(_net(), []))
    return {str(nbytes): growth for nbytes, growth in map(_growth, (32, 2048))}


def _growth(width: int) -> tuple[int, int]:
    model = Net(width=width, inner=2 * width)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    _sharded(model, model.blocks)
    before = _resident_bytes()
    local = fsdp_shards(model)
    local.locate()
    return nbytes, _resident_bytes() - before


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def llama_rebuilt() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _rebuilt(LlamaForCausalLM, LlamaConfig(**_HF, tie_word_embeddings=False))


def tied_qwen3_rebuilt() -> dict[str, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _rebuilt(Qwen3ForCausalLM, Qwen3Config(**_HF, head_dim=16, tie_word_embeddings=True))


def qwen3_moe_rebuilt() -> dict[str, Any]:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    config = Qwen3MoeConfig(**_HF, **sizes)
    return _rebuilt(Qwen3MoeForCausalLM, config)


def mixtral_rebuilt() -> dict[str, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    return _rebuilt(MixtralForCausalLM, MixtralConfig(**_HF, num_local_experts=5))


def hsdp_rebuilt() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    config = LlamaConfig(**_HF, tie_word_embeddings=True)
    return _rebuilt(LlamaForCausalLM, config, lambda model: _sharded(model, model.model.layers, mesh=mesh))


def tensor_parallel_under_fsdp_rebuilt() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from transformers import LlamaConfig, LlamaForCausalLM

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}

    def shard(model: Any) -> Any:
        for layer in model.model.layers:
            parallelize_module(layer, mesh["tp"], plan)
        return _sharded(model, model.model.layers, mesh=mesh["dp"])

    config = LlamaConfig(**{**_HF, "num_key_value_heads": 2}, tie_word_embeddings=False)
    # Ranks of one tensor-parallel group see the same data, or their replicas drift apart.
    return _rebuilt(LlamaForCausalLM, config, shard, data_rank=mesh.get_local_rank("dp"))


def flat_rebuilt() -> dict[str, Any]:
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def shard(model: Any) -> Any:
        return _flat(model, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}))

    return _rebuilt(LlamaForCausalLM, LlamaConfig(**_HF, tie_word_embeddings=True), shard)


_HF: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _rebuilt(
    model_class: Any, config: Any, shard: Any = None, data_rank: int | None = None
) -> dict[str, Any]:
    """Put a checkpoint together from the live regions alone and compare logits; train, and do so again."""
    torch.manual_seed(3)
    model = model_class(config)
    saved = _saved_names(model)
    model = shard(model) if shard else _sharded(model, model.model.layers)
    local = fsdp_shards(model)
    found: dict[str, Any] = {}
    for when, num_steps in (("at first", 0), ("after steps", 3)):
        _train(model, num_steps, vocab=50, data_rank=data_rank)
        found[when] = _compare_logits(model, local, model_class, config, saved)
    regions = sorted((shard.spec.name, str(shard.region)) for shard in local.shards)
    return {**found, "regions": regions, "config": {**config.to_dict(), "dtype": "float32"}}


def _compare_logits(
    model: Any, local: LocalShards, model_class: Any, config: Any, saved: set[str]
) -> dict[str, bool]:
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, [(s.spec, s.region, s.data.clone()) for s in local.shards])
    tensors = _assemble([piece for rank in pieces for piece in rank])
    with tempfile.TemporaryDirectory() as directory:
        got = _load(model_class, config, tensors, Path(directory))(ids).logits
    # Tensor parallelism adds up in another order; a wrong region is off by 1e-2 and more.
    close = torch.allclose(got, expected, atol=1e-5, rtol=1e-4)
    return {"same_names": set(tensors) == saved, "same_logits": close}


def _saved_names(model: Any) -> set[str]:
    """Tensor names of the model's own checkpoint, which only rank 0 writes."""
    from safetensors import safe_open

    names: set[str] = set()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        for file in Path(directory).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                names |= set(opened.keys())
    from_rank_zero: list[Any] = [names]
    dist.broadcast_object_list(from_rank_zero, src=0)
    return set(from_rank_zero[0])


def _assemble(pieces: list[tuple[Any, Region, torch.Tensor]]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for spec, region, data in pieces:
        whole = tensors.setdefault(spec.name, torch.full(spec.shape, float("nan"), dtype=data.dtype))
        _slice(whole, region).copy_(data)
    return tensors


def _load(model_class: Any, config: Any, tensors: dict[str, torch.Tensor], directory: Path) -> Any:
    from safetensors.torch import save_file

    config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model_class.from_pretrained(directory, dtype=torch.float32).eval()
