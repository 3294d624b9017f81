"""Tiny random checkpoints of model families whose loaders the engines write themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

# 500 is no multiple of 64, so that vLLM pads the vocabulary. A head of 32 is the smallest that its CPU
# attention takes.
COMMON: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3 (tied)": ("Qwen3Config", {"tie_word_embeddings": True}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "Mixtral": ("MixtralConfig", EXPERTS),
    "DeepSeek-V2-Lite": ("DeepseekV2Config", {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "DeepSeek-V3": ("DeepseekV3Config", {**LATENT, "q_lora_rank": 32, "topk_method": "noaux_tc"}),
    "Gemma 2": ("Gemma2Config", {"query_pre_attn_scalar": 32}),
    "Gemma 3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 32}),
    "Phi-3": ("Phi3Config", {"hidden_size": 128}),
    "GLM-4": ("Glm4Config", {}),
    "OLMo 2": ("Olmo2Config", {"hidden_size": 128}),
    "gpt-oss": ("GptOssConfig", {**EXPERTS, "intermediate_size": 128, "sliding_window": 64}),
}


def save_checkpoint(family: str, folder: Path, **more: Any) -> None:
    """Write a random bf16 checkpoint of a family as transformers writes it; in a world, rank 0 does.

    Args:
        family: one of :data:`FAMILIES`.
        folder: to write.
        more: settings of its configuration.
    """
    import transformers

    config_name, settings = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**COMMON, **settings, **more})
    config.dtype = torch.bfloat16
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
    model.save_pretrained(folder)


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
