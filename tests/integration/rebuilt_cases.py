"""Transformers models, rebuilt from the live regions of their sharded ranks; functions run in every rank."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rdt_megatron import fsdp_shards
from tests.integration.flat_cases import wrap_flat
from tests.integration.sharded_net import shard_fully, slice_of, train

if TYPE_CHECKING:
    from rdt_core.local_shards import LocalShards
    from rdt_core.region import Region


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
    return _rebuilt(LlamaForCausalLM, config, lambda model: shard_fully(model, model.model.layers, mesh=mesh))


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
        return shard_fully(model, model.model.layers, mesh=mesh["dp"])

    config = LlamaConfig(**{**_HF, "num_key_value_heads": 2}, tie_word_embeddings=False)
    # Ranks of one tensor-parallel group see the same data, or their replicas drift apart.
    return _rebuilt(LlamaForCausalLM, config, shard, data_rank=mesh.get_local_rank("dp"))


def flat_rebuilt() -> dict[str, Any]:
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def shard(model: Any) -> Any:
        return wrap_flat(model, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}))

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
    model = shard(model) if shard else shard_fully(model, model.model.layers)
    local = fsdp_shards(model)
    found: dict[str, Any] = {}
    for when, num_steps in (("at first", 0), ("after steps", 3)):
        train(model, num_steps, vocab=50, data_rank=data_rank)
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
        slice_of(whole, region).copy_(data)
    return tensors


def _load(model_class: Any, config: Any, tensors: dict[str, torch.Tensor], directory: Path) -> Any:
    from safetensors.torch import save_file

    config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model_class.from_pretrained(directory, dtype=torch.float32).eval()
