"""``rdt plan``: the reads of every rank of one engine, as a connect would plan them."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path  # noqa: TC003  typer reads annotations at run time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from rdt_core.cli.heat_map import write_heat_map
from rdt_core.cli.inputs import (
    EngineOption,
    JsonOption,
    ModelArgument,
    PresetOption,
    Scenario,
    TrainerOption,
    TrainersOption,
    find_scenario,
    manifests_of,
)
from rdt_core.cli.output import print_json, print_lines, print_table, show_bytes
from rdt_core.link_prices import cost_over
from rdt_core.models.parameter import build_manifest
from rdt_core.models.reloaded import ReloadedLayout
from rdt_core.plan_summary import MEANINGS, PlanSummary, imbalance
from rdt_core.planner import build_plan_from
from rdt_core.sources import SourceIndex
from rdt_core.transports import known_transports

_MAX_ROWS = 32


def _parse_pattern(text: str) -> re.Pattern[str]:
    """For typer: a regular expression, or a usage error."""
    try:
        return re.compile(text)
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is no regular expression: {error}.") from None


def _parse_transport(text: str) -> str:
    """For typer: a transport's name, or a usage error."""
    if text not in known_transports():
        raise typer.BadParameter(f"{text!r} is no transport. Use one of {', '.join(known_transports())}.")
    return text


def run(  # noqa: PLR0913, PLR0917  options of the command line
    model_config: ModelArgument = None,
    preset: PresetOption = None,
    trainer: TrainerOption = None,
    engine: EngineOption = None,
    trainers: TrainersOption = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Plan this engine rank only.")] = None,
    transport: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            parser=_parse_transport,
            help="Of every link, which decides how columns are read: nixl, or cuda_ipc inside a node.",
        ),
    ] = "nixl",
    reload: Annotated[
        re.Pattern[str] | None,
        typer.Option(
            metavar="REGEX",
            parser=_parse_pattern,
            help="Tensors that the engine's own loader must take; `rdt status` shows which an engine has.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a heat map of who reads how much from whom.")
    ] = None,
    as_json: JsonOption = False,  # noqa: FBT002  a flag of the command line
) -> None:
    """Plan the reads of one engine's ranks: bytes by trainer rank, how they land and why, balance, memory.

    The planner is the one that runs at connect, at the prices of one transport for all links. A mixture of
    experts with large tensor-parallel engines takes a minute; --rank N plans one rank in seconds.
    """
    scenario = find_scenario(model_config, preset, trainer, engine, trainers)
    held, served = scenario.both()
    if reload is not None:
        served = ReloadedLayout(served, reload)
    if rank is not None and rank >= served.world_size:
        raise typer.BadParameter(f"--rank {rank} is not one of the engine's {served.world_size} ranks.")
    sources = SourceIndex(manifests_of(held))
    cost = cost_over(dict.fromkeys(range(held.world_size), transport), "auto")
    summary = PlanSummary()
    ranks = range(served.world_size) if rank is None else [rank]
    console = Console(stderr=True)
    is_quiet = as_json or not console.is_terminal
    for each in track(ranks, "planning", console=console, transient=True, disable=is_quiet):
        manifest = build_manifest(served, each, f"engine-{each // 8}")
        summary.add(manifest, build_plan_from(manifest, sources, cost=cost))
    if html is not None:
        write_heat_map(html, _title(scenario), summary, held.world_size)
    if as_json:
        print_json(_as_dict(scenario, summary, held.world_size))
    else:
        _show(scenario, summary, held.world_size)
        if html is not None:
            print_lines(f"heat map: {html}")


def _title(scenario: Scenario) -> str:
    return f"{scenario.name}: {scenario.trainer_spec} to {scenario.engine_spec}"


def _as_dict(scenario: Scenario, summary: PlanSummary, num_trainers: int) -> dict[str, Any]:
    egress = summary.egress(num_trainers)
    return {
        "model": scenario.name,
        "trainer": scenario.trainer_spec,
        "engine": scenario.engine_spec,
        "ways": {way: {**asdict(total), "meaning": MEANINGS[way]} for way, total in summary.ways().items()},
        "ranks": [asdict(rank) for rank in summary.ranks],
        "trainer_egress_nbytes": egress,
        "trainer_imbalance": imbalance(egress),
    }


def _show(scenario: Scenario, summary: PlanSummary, num_trainers: int) -> None:
    print_lines(_title(scenario))
    print_table(
        "Engine ranks",
        ("#rank", "#needed", "#read", "#reads", "#trainers", "#parameters", "#landing", "#arenas"),
        [
            (
                total.rank,
                show_bytes(total.nbytes),
                show_bytes(total.read_nbytes),
                total.num_reads,
                len(total.by_trainer),
                show_bytes(total.parameter_nbytes),
                show_bytes(total.landing_nbytes),
                show_bytes(total.arena_nbytes),
            )
            for total in summary.ranks[:_MAX_ROWS]
        ],
    )
    if len(summary.ranks) > _MAX_ROWS:
        print_lines(f"... and {len(summary.ranks) - _MAX_ROWS} more; --json lists all.")
    print_table(
        "How bytes land",
        ("method", "#tensors", "#parts", "#bytes", "why"),
        [
            (way, total.num_tensors, total.num_copies, show_bytes(total.nbytes), MEANINGS[way])
            for way, total in summary.ways().items()
        ],
    )
    print_lines(*(f"{way}, for example {total.example}" for way, total in summary.ways().items()))
    egress = summary.egress(num_trainers)
    print_lines(
        f"trainer egress for one engine: {show_bytes(min(egress))} to {show_bytes(max(egress))} a rank, "
        f"the largest {imbalance(egress):.1%} above the mean"
    )
