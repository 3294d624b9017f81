"""The trainer's side: Megatron-core models of a configuration, their training step and their logits."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from tests.megatron.hf_models import MAX_POSITIONS, ROPE_BASE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.megatron.configurations import Configuration

NUM_SEQUENCES, SEQUENCE_LENGTH = 2, 12


class _Norm:
    """A norm that marks its parameters for sequence parallelism, as the fused ones on a GPU do."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> Any:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm: Any = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class _LatentAttention(DotProductAttention):  # type: ignore[misc]  # mypy does not see Megatron
    """Attention whose values are of another width than its keys; Megatron has it for GPUs only."""

    def __init__(self, config: Any, **rest: Any) -> None:
        known = {key: value for key, value in rest.items() if key not in ("k_channels", "v_channels")}
        super().__init__(config, **known)
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * config.v_head_dim


@dataclass(frozen=True, slots=True)
class Trainer:
    """One rank's part of a model in training.

    Args:
        chunks: model chunks as Megatron trains them, wrapped.
        bare: the same without wrappers.
        optimizer: Megatron's.
    """

    configuration: Configuration
    config: Any
    chunks: list[Any]
    bare: list[Any]
    optimizer: Any

    def train(self, num_steps: int) -> None:
        """Steps on tokens that differ between data-parallel ranks."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for step in range(num_steps):
            seed = 100 * step + dist.get_rank(group)
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            self._run(tokens(self.configuration.vocab, seed), is_training=True)
            succeeded, _, _ = self.optimizer.step()
            assert succeeded

    def logits(self) -> torch.Tensor | None:
        """For the tokens of seed 0, in float32; None where this rank is not of the last pipeline stage."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            found = self._run(tokens(self.configuration.vocab, 0), is_training=False)
        if found is None:
            return None
        whole: torch.Tensor = gather_from_tensor_model_parallel_region(found)
        return whole[..., : self.configuration.vocab].float()

    def _run(self, ids: torch.Tensor, *, is_training: bool) -> torch.Tensor | None:
        """One pass of Megatron's own schedule over the pipeline."""
        positions = torch.arange(SEQUENCE_LENGTH).expand(NUM_SEQUENCES, -1).contiguous()
        hidden = torch.ones(1, 1, SEQUENCE_LENGTH, SEQUENCE_LENGTH, dtype=torch.bool).triu(1)
        kept: list[torch.Tensor] = []

        def step(_: Iterator[Any], chunk: Any) -> Any:
            output = chunk(ids, positions, hidden, labels=ids if is_training else None)

            def loss(value: torch.Tensor, **__: Any) -> Any:
                kept.append(value)
                mean = value.float().mean()
                return mean, {"loss": mean.detach()}

            return output, loss

        is_interleaved = len(self.chunks) > 1
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(()) for _ in self.chunks] if is_interleaved else iter(()),
            model=self.chunks if is_interleaved else self.chunks[0],
            num_microbatches=self.configuration.pp if is_interleaved else 1,
            seq_length=SEQUENCE_LENGTH,
            micro_batch_size=NUM_SEQUENCES,
            forward_only=not is_training,
        )
        return kept[0] if kept else None


def tokens(vocab: int, seed: int) -> torch.Tensor:
    """A batch, the same in every rank that gives the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (NUM_SEQUENCES, SEQUENCE_LENGTH), generator=generator)


def start_trainer(c: Configuration, hf: Any) -> Trainer:
    """Build groups, model and optimizer as a training script does. Collective; ends earlier groups."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=c.tp,
        pipeline_model_parallel_size=c.pp,
        virtual_pipeline_model_parallel_size=c.vpp,
        context_parallel_size=c.cp,
        expert_model_parallel_size=c.ep,
        expert_tensor_parallel_size=c.etp,
    )
    config = megatron_config(c, hf)
    bare = [build_chunk(c, config, hf, stage) for stage in range(c.vpp or 1)]
    for chunk in bare:
        _draw_values(chunk, c)
    chunks = [_wrap(config, chunk, c, is_first=index == 0) for index, chunk in enumerate(bare)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.0,
            clip_grad=0.0,
            bf16=c.dtype == "bfloat16",
            params_dtype=getattr(torch, c.dtype),
            use_distributed_optimizer=c.distributed_optimizer,
            overlap_param_gather=c.overlap_param_gather,
        ),
        chunks,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if c.overlap_param_gather:
        config.no_sync_func = chunks[0].no_sync
        config.param_sync_func = chunks[0].start_param_sync
    return Trainer(c, config, chunks, bare, optimizer)


def _wrap(config: Any, chunk: Any, c: Configuration, *, is_first: bool) -> Any:
    inner = Float16Module(config, chunk) if c.dtype == "bfloat16" else chunk
    if c.float32_routers:
        for name, parameter in inner.named_parameters():
            parameter.data = parameter.data.float() if name.endswith("router.weight") else parameter.data
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=c.distributed_optimizer,
            overlap_grad_reduce=c.overlap_param_gather,
            overlap_param_gather=c.overlap_param_gather,
            bucket_size=20000,
        ),
        inner,
        disable_bucketing=not is_first,
    )


def megatron_config(c: Configuration, hf: Any, **overrides: Any) -> Any:
    """Megatron's configuration of the model that the transformers configuration describes."""
    is_starcoder = c.family == "starcoder2"
    settings: dict[str, Any] = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "ffn_hidden_size": hf.intermediate_size,
        "add_bias_linear": c.has_biases,
        "add_qkv_bias": c.family == "qwen2",
        "gated_linear_unit": not is_starcoder,
        "activation_func": _gelu_tanh if is_starcoder else torch.nn.functional.silu,
        "normalization": "LayerNorm" if is_starcoder else "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": c.family in ("qwen3", "qwen3_moe", "deepseek_v3"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": c.tp,
        "sequence_parallel": c.sequence_parallel,
        "pipeline_model_parallel_size": c.pp,
        "virtual_pipeline_model_parallel_size": c.vpp,
        "num_layers_in_first_pipeline_stage": c.first_stage_layers,
        "expert_model_parallel_size": c.ep,
        "expert_tensor_parallel_size": c.etp,
        "pipeline_dtype": getattr(torch, c.dtype),
        "params_dtype": getattr(torch, c.dtype),
        "bf16": c.dtype == "bfloat16",
        # Fused kernels and CUDA's random states do not exist on a CPU.
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "deallocate_pipeline_outputs": False,
    }
    settings |= _expert_settings(c, hf) | overrides
    if c.family == "deepseek_v3":
        return MLATransformerConfig(**settings, **_latent_settings(hf))
    return TransformerConfig(**settings)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _expert_settings(c: Configuration, hf: Any) -> dict[str, Any]:
    common = {
        "moe_router_topk": getattr(hf, "num_experts_per_tok", None),
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": c.experts == "stacked",
        "moe_use_legacy_grouped_gemm": c.experts == "stacked",
    }
    if c.experts == "sequential":
        del common["moe_use_legacy_grouped_gemm"]  # gone in later versions
    match c.family:
        case "qwen3_moe":
            pattern = [0 if i in hf.mlp_only_layers else 1 for i in range(hf.num_hidden_layers)]
            own = {
                "num_moe_experts": hf.num_experts,
                "moe_ffn_hidden_size": hf.moe_intermediate_size,
                "moe_layer_freq": pattern,
            }
        case "mixtral":
            own = {"num_moe_experts": hf.num_local_experts, "moe_ffn_hidden_size": hf.intermediate_size}
        case "deepseek_v3":
            pattern = [int(i >= hf.first_k_dense_replace) for i in range(hf.num_hidden_layers)]
            own = {
                "num_moe_experts": hf.n_routed_experts,
                "moe_ffn_hidden_size": hf.moe_intermediate_size,
                "moe_layer_freq": pattern,
                "moe_shared_expert_intermediate_size": hf.n_shared_experts * hf.moe_intermediate_size,
                "moe_router_score_function": "sigmoid",
                "moe_router_enable_expert_bias": True,
                "moe_router_num_groups": hf.n_group,
                "moe_router_group_topk": hf.topk_group,
                "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
            }
        case _:
            return {}
    return common | own


def _latent_settings(hf: Any) -> dict[str, Any]:
    return {
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        "rope_type": "rope",
        "rotary_base": ROPE_BASE,
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def build_chunk(c: Configuration, config: Any, hf: Any, stage: int) -> Any:
    """One model chunk of this rank."""
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        vp_stage=stage if c.vpp else None,
    )
    for layer in spec.layer_specs:
        _use_own_parts(layer.submodules, is_latent=c.family == "deepseek_v3")
    spec.layer_norm = _Norm
    is_first, is_last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    where: dict[str, Any] = {"ignore_virtual": False, "vp_stage": stage} if c.vpp else {}
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=_pad(c.vocab, 128 * c.tp),
        max_sequence_length=MAX_POSITIONS,
        pre_process=is_first(**where),
        post_process=is_last(**where),
        share_embeddings_and_output_weights=c.is_tied,
        position_embedding_type="rope",
        rotary_base=ROPE_BASE,
        vp_stage=stage if c.vpp else None,
    )


def _pad(size: int, multiple: int) -> int:
    """Rows of an embedding as Megatron-LM's scripts choose them."""
    return -(-size // multiple) * multiple


def _use_own_parts(layer: Any, *, is_latent: bool) -> None:
    layer.input_layernorm = layer.pre_mlp_layernorm = _Norm
    attention = layer.self_attention.submodules
    if is_latent:
        attention.core_attention = _LatentAttention
        attention.q_layernorm = attention.kv_layernorm = _Norm
    elif attention.q_layernorm.__name__ != "IdentityOp":
        attention.q_layernorm = attention.k_layernorm = _Norm


def _draw_values(chunk: Any, c: Configuration) -> None:
    """Values that differ wherever a mistake could swap two tensors, and agree where ranks hold replicas."""
    tp = parallel_state.get_tensor_model_parallel_rank()
    ep = parallel_state.get_expert_model_parallel_rank()
    etp = parallel_state.get_expert_tensor_parallel_rank()
    named = [*chunk.named_parameters(), *((n, b) for n, b in chunk.named_buffers() if "expert_bias" in n)]
    for name, tensor in named:
        key = _global_name(chunk, name)
        if c.is_tied and key == "output_layer.weight":
            key = "embedding.word_embeddings.weight"
        is_split = getattr(tensor, "tensor_model_parallel", False)
        if ".experts." in key:
            key += f" ep {ep}" + (f" etp {etp}" if is_split else "")
        elif is_split:
            key += f" tp {tp}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        drawn = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            tensor.copy_(1 + 0.1 * drawn if "norm" in key and "bias" not in key else 0.1 * drawn)


def _global_name(chunk: Any, name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = f"global {chunk.decoder.layers[int(parts[2])].layer_number}"
    return ".".join(parts)
