"""A policy small enough to learn in a minute on two CPU cores: a Qwen3 of two layers with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NUM_WORDS = 512
NUM_GOOD_WORDS = 64
"""The reward is the share of a response's words that are among the first 64: an eighth, by chance."""


def save_policy(folder: Path) -> Path:
    """Write the first version as a checkpoint, which engine and trainer both start from."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=NUM_WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(NUM_WORDS)}, unk_token="w0"))  # noqa: S106  a word
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)  # noqa: S106  a word
    return folder


def load_policy(folder: Path | str) -> Any:
    """The model in float32, for training."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def reward_of(response: Sequence[int]) -> float:
    """The share of good words."""
    return sum(token < NUM_GOOD_WORDS for token in response) / len(response)


def response_logprobs(model: Any, sequences: torch.Tensor, num_prompt_tokens: int) -> torch.Tensor:
    """Log-probability of every token of the responses, given what stands before it."""
    logits: torch.Tensor = model(sequences).logits[:, num_prompt_tokens - 1 : -1].float()
    taken = sequences[:, num_prompt_tokens:, None]
    return logits.log_softmax(-1).gather(2, taken)[..., 0]
