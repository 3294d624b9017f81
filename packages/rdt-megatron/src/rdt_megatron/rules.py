"""What a Megatron-core parameter holds of a checkpoint, as data: the words that family tables are written in.

Names may hold ``{layer}`` (global, from 0) and ``{expert}``; in a parameter's name the expert is counted on
its own rank, in a tensor's name over the whole model. Pure: imports neither torch nor Megatron.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

# Mesh axes along which a layer's parameter can be cut: tensor parallelism, and that of the experts, which
# Megatron sizes on its own. Pipeline stages hold other layers, data and context parallel ranks the same.
AxisName: TypeAlias = Literal["tp", "etp"]


@dataclass(frozen=True, slots=True)
class Whole:
    """Every rank holds all of one tensor."""

    parameter: str
    into: str


@dataclass(frozen=True, slots=True)
class Split:
    """Each rank of ``axis`` holds one block of one tensor's ``dim``.

    Args:
        parameter: Megatron's name.
        into: checkpoint name.
        dim: of both.
        axis: of the mesh.
        size: field of ``Sizes`` with the dim's global size, for a parameter that some layer specs split and
            others repeat in every rank; None where it is always split.
    """

    parameter: str
    into: str
    dim: int = 0
    axis: AxisName = "tp"
    size: Literal["query_latent", "key_value_latent"] | None = None


@dataclass(frozen=True, slots=True)
class Fused:
    """Several tensors in one parameter, one below the other.

    Args:
        parameter: Megatron's name.
        into: checkpoint names, in the order in which they lie in memory.
        axis: of the mesh; cuts dim 0.
        interleave: ``by_rank``: every rank has an equal part of each tensor, in order (a gated MLP's
            ``[gate; up]``). ``by_query_group``: heads are grouped before they are cut, so the rows of one
            group are its query heads, its key head and its value head.
    """

    parameter: str
    into: tuple[str, ...]
    axis: AxisName = "tp"
    interleave: Literal["by_rank", "by_query_group"] = "by_rank"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Rows of tokens, split over ``tp`` and padded at the end to a size that divides; padding has no tensor.

    Args:
        parameter: Megatron's name.
        into: checkpoint name.
        tied_into: name where the checkpoint shares embedding and output, of which the last pipeline stage
            then holds a copy of its own.
    """

    parameter: str
    into: str
    tied_into: str | None = None


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """All of a rank's experts in one matrix, each transposed (``GroupedMLP``, before Megatron-core 0.17).

    Args:
        parameter: Megatron's name.
        into: checkpoint names, with ``{expert}``, of the tensors that share one expert's part evenly.
        stacked_dim: the parameter's dim that runs over experts and features.

    Source: ``megatron/core/transformer/moe/experts.py``, ``GroupedMLP.forward`` (0.16.1), which views the
    memory as one matrix an expert, whatever the parameter's own shape says.
    """

    parameter: str
    into: tuple[str, ...]
    stacked_dim: int


Rule: TypeAlias = Whole | Split | Fused | Vocabulary | StackedExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family of models is laid out.

    Args:
        table: module that holds the rules, to be named where one is missing; give ``__name__``.
        model_types: values of ``model_type`` in a checkpoint's ``config.json``.
        rules: one a kind of parameter; a parameter without one is refused.
    """

    table: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]


def each_layer(*rules: Rule) -> tuple[Rule, ...]:
    """The rules of a layer, for every decoder layer; their names lack what stands before the layer's own."""
    return tuple(_prefix(rule, "decoder.layers.{layer}.", "model.layers.{layer}.") for rule in rules)


def tensors_of(rule: Rule) -> tuple[str, ...]:
    """Checkpoint names that a rule fills."""
    return rule.into if isinstance(rule.into, tuple) else (rule.into,)


def _prefix(rule: Rule, parameter: str, tensor: str) -> Rule:
    if isinstance(rule, Fused | StackedExperts):
        return replace(
            rule, parameter=parameter + rule.parameter, into=tuple(tensor + name for name in rule.into)
        )
    return replace(rule, parameter=parameter + rule.parameter, into=tensor + rule.into)


@dataclass(frozen=True, slots=True)
class Match:
    """The rule for one parameter, and the numbers in its name.

    Args:
        layer: global, from 0; None outside of layers.
        expert: counted on this rank; None where the name has none.
    """

    rule: Rule
    layer: int | None
    expert: int | None


class RuleIndex:
    """Finds the rule for a parameter's name; built once, asked for every parameter."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._candidates: dict[str, list[tuple[re.Pattern[str], Rule]]] = {}
        for rule in rules:
            plain = rule.parameter.replace("{layer}", "0").replace("{expert}", "0")
            self._candidates.setdefault(_mask_digits(plain), []).append((_compile(rule.parameter), rule))

    def find(self, name: str) -> Match | None:
        """The rule whose name this is; None when there is none.

        Args:
            name: of the parameter in the bare model, with the layer counted over the whole model.
        """
        for pattern, rule in self._candidates.get(_mask_digits(name), ()):
            found = pattern.fullmatch(name)
            if found is not None:
                numbers = {key: int(value) for key, value in found.groupdict().items()}
                return Match(rule, numbers.get("layer"), numbers.get("expert"))
        return None


def _compile(name: str) -> re.Pattern[str]:
    literal = re.escape(name)
    for word in ("layer", "expert"):
        literal = literal.replace(re.escape("{" + word + "}"), rf"(?P<{word}>\d+)")
    return re.compile(literal)


def _mask_digits(name: str) -> str:
    return re.sub(r"\d+", "#", name)
