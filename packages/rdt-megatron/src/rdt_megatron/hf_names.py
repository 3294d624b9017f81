"""Where transformers' parameters in memory differ from its checkpoint's tensors, by model type.

Transformers 5 holds the experts of a layer in one parameter and saves them one by one. The table says
how; a fused parameter of a model type that it lacks is refused, since its names would be guesses.

Source: transformers ``conversion_mapping.py`` (5.19), which applies the reverse while saving.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdt_core.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """A parameter ``[num_experts, rows, columns]`` that the checkpoint holds as matrices of each expert.

    Args:
        parameter: how the parameter's name ends in memory.
        into: names of one expert's matrices, which split the rows evenly, in order; ``{}`` is the expert.
    """

    parameter: str
    into: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of model types is saved.

    Args:
        fused: its fused parameters; empty when the checkpoint holds them as they are in memory.
        renames: parts of a name in memory and what the checkpoint has in their place.
    """

    fused: tuple[FusedExperts, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One checkpoint tensor inside of a fused parameter, which has a leading dim more.

    Args:
        name: checkpoint name.
        region: where it lies in the parameter.
    """

    name: str
    region: Region


class UnknownFamilyError(ValueError):
    """A fused parameter of a model type without a rule. Raised to the exporter, which knows the rank."""


_GATE_UP_DOWN = (
    FusedExperts(".experts.gate_up_proj", (".experts.{}.gate_proj.weight", ".experts.{}.up_proj.weight")),
    FusedExperts(".experts.down_proj", (".experts.{}.down_proj.weight",)),
)
_W1_W3_W2 = (
    FusedExperts(".experts.gate_up_proj", (".experts.{}.w1.weight", ".experts.{}.w3.weight")),
    FusedExperts(".experts.down_proj", (".experts.{}.w2.weight",)),
)
_AS_IN_MEMORY = Family()
_PER_EXPERT = Family(_GATE_UP_DOWN)

# Absent on purpose: types whose checkpoint also holds buffers that training changes (the router's
# e_score_correction_bias of deepseek_v3 and glm4_moe), since buffers are not exported.
FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(_W1_W3_W2, renames=((".mlp.", ".block_sparse_moe."),)),
    "olmoe": _PER_EXPERT,
    "qwen2_moe": _PER_EXPERT,
    "qwen3_moe": _PER_EXPERT,
}
_LOOKS_FUSED = re.compile(r"\.experts\.[a-z0-9_]+$")


def name_unfused(name: str, model_type: str | None) -> str | None:
    """What the checkpoint calls a parameter that it holds as it is in memory; None for a fused one.

    Args:
        name: of the parameter in the bare model.
        model_type: ``model.config.model_type``; None for a model that is not from transformers, whose names
            are taken as they are.

    Raises:
        UnknownFamilyError: the parameter looks fused and the table has no rule for it.
    """
    if model_type is None:
        return name
    family = FAMILIES.get(model_type, _AS_IN_MEMORY)
    if _find_fused(name, family) is not None:
        return None
    if _LOOKS_FUSED.search(name):
        raise UnknownFamilyError(
            f"the parameter holds several experts and model type {model_type!r} has no rule for it"
        )
    return _rename(name, family)


def split_fused(name: str, shape: tuple[int, ...], model_type: str | None) -> Iterator[Piece]:
    """The checkpoint tensors that one fused parameter holds, in order; none for one that is not.

    Args:
        name: of the parameter in the bare model.
        shape: its GLOBAL shape, in elements.
        model_type: see :func:`name_unfused`.
    """
    family = FAMILIES.get(model_type or "", _AS_IN_MEMORY)
    fused = _find_fused(name, family)
    if fused is None:
        return
    prefix = name.removesuffix(fused.parameter)
    num_experts, rows, columns = shape
    part_rows = rows // len(fused.into)
    for expert in range(num_experts):
        for index, template in enumerate(fused.into):
            region = Region((expert, index * part_rows, 0), (expert + 1, (index + 1) * part_rows, columns))
            yield Piece(_rename(prefix + template.format(expert), family), region)


def _find_fused(name: str, family: Family) -> FusedExperts | None:
    return next((rule for rule in family.fused if name.endswith(rule.parameter)), None)


def _rename(name: str, family: Family) -> str:
    for in_memory, in_checkpoint in family.renames:
        name = name.replace(in_memory, in_checkpoint)
    return name
