"""The checkpoint's side: transformers configurations of tiny models, and a load of what was exported."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.megatron.configurations import Configuration

NUM_LAYERS = 4
HEAD_DIM = 16
MAX_POSITIONS = 64
ROPE_BASE = 10000


def hf_config(c: Configuration) -> Any:
    """The transformers configuration of a row."""
    common = {
        "vocab_size": c.vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": c.is_tied,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
    }
    return BUILDERS[c.family](c, common)


def _llama(c: Configuration, common: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**common, attention_bias=c.has_biases, mlp_bias=c.has_biases)


def _qwen2(_: Configuration, common: dict[str, Any]) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**common)


def _qwen3(_: Configuration, common: dict[str, Any]) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**common)


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}


def _qwen3_moe(_: Configuration, common: dict[str, Any]) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**common, **_EXPERTS, num_experts=4, norm_topk_prob=True, mlp_only_layers=[1])


def _mixtral(_: Configuration, common: dict[str, Any]) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**{**common, "intermediate_size": 48}, num_local_experts=4, num_experts_per_tok=2)


def _deepseek_v3(_: Configuration, common: dict[str, Any]) -> Any:
    from transformers import DeepseekV3Config

    latent = {
        "num_key_value_heads": 8,
        "head_dim": 8,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    }
    routing = {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    return DeepseekV3Config(**{**common, **latent}, **_EXPERTS, **routing)


def _starcoder2(_: Configuration, common: dict[str, Any]) -> Any:
    from transformers import Starcoder2Config

    known = {k: v for k, v in common.items() if k not in ("rms_norm_eps", "head_dim")}
    return Starcoder2Config(
        **{**known, "hidden_size": 128},
        hidden_act="gelu_pytorch_tanh",
        norm_epsilon=1e-6,
        sliding_window=None,
        use_bias=True,
        residual_dropout=0.0,
        embedding_dropout=0.0,
    )


BUILDERS = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "starcoder2": _starcoder2,
}


def logits_of(config: Any, tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the transformers model that loads exactly these tensors as its checkpoint."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    assert not any(loading.values()), loading
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(tokens).logits
    return logits
