"""Options that several commands share: which model, which layouts, how many ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rdt_core.errors import ConfigError
from rdt_core.models.config import load_config
from rdt_core.models.divide import divide
from rdt_core.models.parameter import build_manifest
from rdt_core.models.preset import Preset, list_presets, load_preset
from rdt_core.models.specs import ENGINES, TRAINERS, LayoutSpec, make_engine, make_trainer, parse_spec
from rdt_core.models.units import Model, describe_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.manifest import Manifest
    from rdt_core.models.parameter import Layout


def parse_trainer(text: str) -> LayoutSpec:
    """For typer: a trainer's layout, or a usage error."""
    return _parse(text, TRAINERS)


def parse_engine(text: str) -> LayoutSpec:
    """For typer: an engine's layout, or a usage error."""
    return _parse(text, ENGINES)


def parse_layout(text: str) -> LayoutSpec:
    """For typer: a layout of either side, or a usage error."""
    return _parse(text, {**TRAINERS, **ENGINES})


def _parse(text: str, kinds: Mapping[str, tuple[str, ...]]) -> LayoutSpec:
    try:
        return parse_spec(text, kinds)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


ModelArgument = Annotated[
    Path | None,
    typer.Argument(metavar="MODEL_CONFIG", help="A model's config.json, or the folder that has it."),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="NAME", help=f"A published model and layout: {', '.join(list_presets())}."
    ),
]
TrainerOption = Annotated[
    LayoutSpec | None,
    typer.Option(
        "--trainer",
        parser=parse_trainer,
        metavar="LAYOUT",
        help="megatron:tp=8,pp=8,ep=32 (also cp, dp, etp, vpp, first, last) or fsdp:dp=64 (also "
        "replicate, dtype).",
    ),
]
EngineOption = Annotated[
    LayoutSpec | None,
    typer.Option(
        "--engine",
        parser=parse_engine,
        metavar="LAYOUT",
        help="vllm:tp=16,dp=8 (also pp, ep, dtype) or sglang:tp=8 (also dp, ep, dp_attention, pp, dtype).",
    ),
]
TrainersOption = Annotated[
    int | None, typer.Option("--trainers", min=1, metavar="N", help="Trainer ranks in all; dp follows.")
]
EnginesOption = Annotated[
    int | None,
    typer.Option("--engines", min=1, metavar="N", help="Engine ranks in all: engines times their ranks."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a command was asked about.

    Args:
        name: of the model.
        source: where its sizes come from.
        model: its tensors.
        trainer, engine: layouts; None where the command line and the preset name none.
        num_engines: engines of that layout.
    """

    name: str
    source: str
    model: Model
    trainer: Layout | None
    engine: Layout | None
    trainer_spec: str
    engine_spec: str
    num_engines: int

    def both(self) -> tuple[Layout, Layout]:
        """Trainer and engine, for commands that need both."""
        if self.trainer is None or self.engine is None:
            raise typer.BadParameter("give --trainer and --engine, or --preset.")
        return self.trainer, self.engine


def find_scenario(
    path: Path | None,
    preset: str | None,
    trainer: LayoutSpec | None,
    engine: LayoutSpec | None,
    trainers: int | None = None,
    engines: int | None = None,
) -> Scenario:
    """Put together what the options say; a preset fills what they do not.

    Raises:
        ConfigError: the config or the preset cannot be used, or sizes do not divide.
    """
    if (path is None) == (preset is None):
        raise typer.BadParameter("give either MODEL_CONFIG or --preset.")
    published = load_preset(preset) if preset is not None else None
    if published is not None:
        trainer, trainers = _fill(trainer, trainers, published, "trainer")
        engine, engines = _fill(engine, engines, published, "engine")
    model = describe_model(published.config if published else load_config(path or Path()))
    held = make_trainer(trainer, model, trainers) if trainer else None
    served = make_engine(engine, model) if engine else None
    ranks = engines or (served.world_size if served else 1)
    return Scenario(
        name=preset or model.config.model_type,
        source=published.source if published else str(path),
        model=model,
        trainer=held,
        engine=served,
        trainer_spec=str(trainer) if trainer else "",
        engine_spec=str(engine) if engine else "",
        num_engines=divide(ranks, served.world_size, "--engines", "ranks of one engine") if served else 0,
    )


def _fill(
    spec: LayoutSpec | None, ranks: int | None, preset: Preset, side: str
) -> tuple[LayoutSpec, int | None]:
    """The preset's layout where none is given, with its number of ranks where that was not given either."""
    if spec is not None:
        return spec, ranks
    is_trainer = side == "trainer"
    filled = parse_spec(preset.trainer if is_trainer else preset.engine, TRAINERS if is_trainer else ENGINES)
    return filled, ranks or (preset.trainer_ranks if is_trainer else preset.engine_ranks)


def manifests_of(layout: Layout, gpus_per_node: int = 8, prefix: str = "trainer") -> list[Manifest]:
    """Every rank's manifest, ranks laid out over nodes in order."""
    return [
        build_manifest(layout, rank, f"{prefix}-{rank // gpus_per_node}") for rank in range(layout.world_size)
    ]
