"""What the command line's Megatron layout says of a configuration: the regions of every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rdt_core.models.config import parse_config
from rdt_core.models.families import FAMILIES
from rdt_core.models.megatron import MegatronAxes, MegatronLayout
from rdt_core.models.units import describe_model

if TYPE_CHECKING:
    from tests.megatron.configurations import Configuration

# Megatron's local layer spec, the only one without Transformer Engine, cuts these; Transformer Engine's
# repeats them in every rank, and so does the layout.
CUT_BY_THE_LOCAL_SPEC = ("q_a_proj.weight", "kv_a_proj_with_mqa.weight")


def is_known(c: Configuration) -> bool:
    """Whether the command line knows the model: it has no biases besides q, k and v's."""
    return c.family in FAMILIES and not c.has_biases


def expected_regions(c: Configuration, hf_values: dict[str, Any], rank: int) -> list[list[str]]:
    """Tensor and region of everything that a rank should hold, sorted."""
    fixed = c.tp * c.pp * c.cp
    axes = MegatronAxes(
        tp=c.tp,
        pp=c.pp,
        cp=c.cp,
        dp=c.num_ranks // fixed,
        ep=c.ep,
        etp=c.etp,
        vpp=c.vpp or 1,
        first=c.first_stage_layers or 0,
    )
    layout = MegatronLayout(describe_model(parse_config(hf_values)), axes)
    parts = (part for parameter in layout.parameters(rank) for part in parameter.parts)
    return without_cut(c, sorted([spec.name, str(region)] for spec, region in parts if region.num_elements))


def without_cut(c: Configuration, regions: list[list[str]]) -> list[list[str]]:
    """Leaves out what the two layer specs hold differently."""
    return [row for row in regions if c.tp == 1 or not row[0].endswith(CUT_BY_THE_LOCAL_SPEC)]
