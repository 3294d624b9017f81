"""The tiny model of a chaos run: its values at every version, and what it says greedily then."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from tests.e2e.tiny_models import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPT = (3, 14, 15, 92)
NUM_TOKENS = 8
_TIE = 1e-3
"""Two logits this close are a tie, since engines may add up in another order; apart they are units."""


def values_of(name: str, shape: tuple[int, ...], version: int) -> torch.Tensor:
    """What a tensor holds at a version, whole. Wide enough that no two versions say the same."""
    seed = torch.Generator().manual_seed(version * 1009 + sum(name.encode()))
    drawn = torch.randn(shape, generator=seed)
    return 1 + 0.1 * drawn if "norm" in name else 0.3 * drawn


def make_model() -> Any:
    """The model in transformers, in float32."""
    return FAMILIES["qwen3"]().to(torch.float32).eval().requires_grad_(requires_grad=False)


def list_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint."""
    return {name: tuple(parameter.shape) for name, parameter in make_model().named_parameters()}


class Reference:
    """Says what the model of any version says; made without any of our code on the way."""

    def __init__(self) -> None:
        self._model = make_model()
        self._version = 0
        self.allows = functools.lru_cache(maxsize=None)(self._allows)

    def _allows(self, version: int, tokens: tuple[int, ...]) -> tuple[bool, ...]:
        """For every token after the prompt, whether the model of this version continues with it."""
        self._load(version)
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*PROMPT, *tokens]])).logits[0]
        return tuple(
            bool(logits[at, token] > logits[at].max() - _TIE)
            for at, token in enumerate(tokens, start=len(PROMPT) - 1)
        )

    def _load(self, version: int) -> None:
        if version != self._version:
            for name, parameter in self._model.named_parameters():
                parameter.copy_(values_of(name, tuple(parameter.shape), version))
            self._version = version


def say_next(model: Any, tokens: Sequence[int]) -> int:
    """The next token, greedily, computed from the beginning."""
    with torch.inference_mode():
        return int(model(torch.tensor([list(tokens)])).logits[0, -1].argmax())
