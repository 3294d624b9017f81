"""What a Hugging Face ``config.json`` says about the shapes of a model's weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdt_core.dtypes import ITEMSIZE_BYTES
from rdt_core.errors import ConfigError
from rdt_core.models.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rdt_core.models.families import Family, MoeNames


@dataclass(frozen=True, slots=True, kw_only=True)
class Mla:
    """Sizes of multi-head latent attention, as config.json names them; ``q_lora_rank`` 0 means none."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """The mixture of experts of a model.

    Args:
        names: of its tensors.
        num_experts: routed experts of a layer.
        intermediate: rows of one expert's gate matrix.
        shared_intermediate: rows of the shared expert's gate matrix; 0 when there is none.
        layers: which layers have experts, the others being dense.
    """

    names: MoeNames
    num_experts: int
    intermediate: int
    shared_intermediate: int
    layers: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes that decide every checkpoint tensor's shape, in elements.

    Args:
        model_type: key of ``rdt_core.models.families.FAMILIES``.
        dtype: of the checkpoint.
        is_tied: whether lm_head is the embedding.
        has_qk_norm: whether q and k are normalized a head.
        has_qkv_bias: whether q, k and v have biases.
        mla: latent attention instead of grouped-query attention.
        moe: None for a dense model.
    """

    model_type: str
    dtype: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    is_tied: bool
    has_qk_norm: bool
    has_qkv_bias: bool
    mla: Mla | None
    moe: Moe | None


# transformers 5 saves some families' number under another's name.
_NUM_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


class _Values:
    """Typed access to a config.json that names the key in every complaint."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values, self._source = values, source

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(
                f"{self._source} has {key}={value!r}, expected an integer. Give the config.json of the model "
                "that the engine serves, as saved with its weights."
            )
        return value

    def first_of(self, *keys: str) -> str:
        """The first key that is there; the first of all where none is."""
        return next((key for key in keys if self._values.get(key) is not None), keys[0])

    def truth(self, key: str, *, default: bool) -> bool:
        value = self._values.get(key)
        return default if value is None else bool(value)

    def flag(self, rule: bool | str) -> bool:  # noqa: FBT001  a row of the table, no flag
        """A family's rule: always, never, or what the key says."""
        return rule if isinstance(rule, bool) else self.truth(rule, default=False)

    def get(self, key: str) -> Any:
        return self._values.get(key)


def load_config(path: Path) -> ModelConfig:
    """Read a config.json, or the one in a model's folder.

    Raises:
        ConfigError: there is no such file, it is no JSON object, or it describes a model without a table.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {file}: {error.strerror}. Give a model's config.json, or the folder that has it."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}. Give a model's config.json.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no JSON object. Give a model's config.json.")
    return parse_config(values, str(file))


def parse_config(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The record of a parsed config.json.

    Raises:
        ConfigError: a value is missing or of another type, or the model type has no table.
    """
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if not isinstance(model_type, str) or family is None:
        raise ConfigError(
            f"{source} is of model_type {model_type!r}, which has no table. Known are "
            f"{', '.join(sorted(FAMILIES))}; add one to rdt_core.models.families.FAMILIES."
        )
    known = _Values(values, source)
    _refuse_biases(known, family, source)
    heads, hidden, layers = (
        known.whole(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    return ModelConfig(
        model_type=model_type,
        dtype=_find_dtype(values, source),
        vocab=known.whole("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=known.whole("num_key_value_heads", heads),
        head_dim=known.whole("head_dim", hidden // max(heads, 1)),
        intermediate=known.whole("intermediate_size"),
        is_tied=known.truth("tie_word_embeddings", default=family.is_tied_by_default),
        has_qk_norm=known.flag(family.qk_norm),
        has_qkv_bias=known.flag(family.qkv_bias),
        mla=_find_mla(known) if family.is_mla else None,
        moe=_find_moe(known, family, layers) if family.moe else None,
    )


def _refuse_biases(known: _Values, family: Family, source: str) -> None:
    """Biases that the family's table does not have would be left out without a word."""
    for key in ("attention_bias", "mlp_bias"):
        if known.truth(key, default=False) and family.qkv_bias != key:
            raise ConfigError(
                f"{source} has {key}=true, and the table of its model_type has no such biases. Add them to "
                "rdt_core.models.families.FAMILIES."
            )


def _find_dtype(values: Mapping[str, Any], source: str) -> str:
    dtype = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
    if dtype not in ITEMSIZE_BYTES:
        raise ConfigError(
            f"{source} has dtype {dtype!r}, expected one of {', '.join(ITEMSIZE_BYTES)}. Quantized "
            "checkpoints are not laid out: give the config of the model as it is trained."
        )
    return str(dtype)


def _find_mla(known: _Values) -> Mla:
    return Mla(
        q_lora_rank=known.whole("q_lora_rank", 0),
        kv_lora_rank=known.whole("kv_lora_rank"),
        qk_nope_head_dim=known.whole("qk_nope_head_dim"),
        qk_rope_head_dim=known.whole("qk_rope_head_dim"),
        v_head_dim=known.whole("v_head_dim"),
    )


def _find_moe(known: _Values, family: Family, layers: int) -> Moe:
    names = family.moe
    if names is None:
        raise ValueError("the family has no experts")
    intermediate = known.whole(names.intermediate_key)
    return Moe(
        names=names,
        num_experts=known.whole(known.first_of(names.num_experts_key, *_NUM_EXPERTS_KEYS)),
        intermediate=intermediate,
        shared_intermediate=known.whole("n_shared_experts", 0) * intermediate if names.shared else 0,
        layers=frozenset(layer for layer in range(layers) if _has_experts(known, layer)),
    )


def _has_experts(known: _Values, layer: int) -> bool:
    """As the modelling code of transformers decides it, over every family's keys."""
    if layer < known.whole("first_k_dense_replace", 0):
        return False
    dense = known.get("mlp_only_layers") or ()
    step = max(known.whole("decoder_sparse_step", 1), known.whole("moe_layer_freq", 1), 1)
    return layer not in dense and (layer + 1 if known.get("decoder_sparse_step") else layer) % step == 0
