"""``rdt simulate``: what a sync would take on machines that need not be there."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path  # noqa: TC003  typer reads annotations at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rdt_core.cli.inputs import (
    EngineOption,
    EnginesOption,
    JsonOption,
    ModelArgument,
    PresetOption,
    Scenario,
    TrainerOption,
    TrainersOption,
    find_scenario,
    parse_layout,
)
from rdt_core.cli.output import print_json, print_lines, print_table, show_bytes, show_seconds
from rdt_core.models.divide import divide
from rdt_core.models.specs import ENGINES, LayoutSpec, make_engine, make_trainer
from rdt_core.plan_summary import imbalance
from rdt_core.simulator.predict import MODES, predict
from rdt_core.simulator.topology import Topology, load_topology
from rdt_core.simulator.traffic import plan_traffic

if TYPE_CHECKING:
    from rdt_core.models.parameter import Layout
    from rdt_core.simulator.predict import Prediction
    from rdt_core.simulator.traffic import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One layout and what was found about it."""

    label: str
    traffic: Traffic
    prediction: Prediction


def run(  # noqa: PLR0913, PLR0917  the options of a command line
    model_config: ModelArgument = None,
    preset: PresetOption = None,
    trainer: TrainerOption = None,
    engine: EngineOption = None,
    trainers: TrainersOption = None,
    engines: EnginesOption = None,
    topology_file: Annotated[
        Path | None,
        typer.Option(
            "--topology",
            metavar="FILE",
            help="TOML with link speeds; default: 8 H100 a node, a 400 Gb/s NIC each.",
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="MODE", help=f"How versions land: {', '.join(MODES)}.")
    ] = "auto",
    has_fan_out: Annotated[  # noqa: FBT002  a flag of the command line
        bool,
        typer.Option(
            "--fan-out/--no-fan-out",
            help="Cross each node's NICs once, then copy inside the node; or read per rank.",
        ),
    ] = True,
    compare: Annotated[
        list[LayoutSpec] | None,
        typer.Option(
            parser=parse_layout, metavar="LAYOUT", help="Also predict this trainer or engine layout."
        ),
    ] = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Predict the seconds of a sync by phase, the link they wait for, and what other layouts would cost.

    Every rank of every engine is planned. What is measured and what is assumed: docs/simulator.md.
    """
    if mode not in MODES:
        raise typer.BadParameter(f"--mode {mode} is none of {', '.join(MODES)}.")
    scenario = find_scenario(model_config, preset, trainer, engine, trainers, engines)
    held, served = scenario.both()
    topology = load_topology(topology_file) if topology_file else Topology()
    started = time.perf_counter()
    main = _predict("as asked", held, served, scenario.num_engines, topology, mode, has_fan_out=has_fan_out)
    planning_s = time.perf_counter() - started
    word = "no fan-out" if has_fan_out else "fan-out"
    others = [
        _predict(
            f"as asked, {word}",
            held,
            served,
            scenario.num_engines,
            topology,
            mode,
            has_fan_out=not has_fan_out,
        )
    ]
    others += [
        _compare(scenario, spec, held, served, topology, mode, has_fan_out=has_fan_out)
        for spec in compare or ()
    ]
    if as_json:
        print_json(_as_dict(scenario, topology, main, others, planning_s))
    else:
        _show(scenario, topology, main, others, planning_s)


def _predict(
    label: str,
    held: Layout,
    served: Layout,
    num_engines: int,
    topology: Topology,
    mode: str,
    *,
    has_fan_out: bool,
) -> _Case:
    traffic = plan_traffic(held, served, num_engines, topology, has_fan_out=has_fan_out)
    return _Case(label=label, traffic=traffic, prediction=predict(traffic, topology, mode=mode))


def _compare(
    scenario: Scenario,
    spec: LayoutSpec,
    held: Layout,
    served: Layout,
    topology: Topology,
    mode: str,
    *,
    has_fan_out: bool,
) -> _Case:
    """The same numbers of ranks under another layout of one side."""
    ranks = served.world_size * scenario.num_engines
    if spec.kind in ENGINES:
        served = make_engine(spec, scenario.model)
    else:
        held = make_trainer(spec, scenario.model, held.world_size)
    num_engines = divide(ranks, served.world_size, "the number of engine ranks", "ranks of one engine")
    return _predict(str(spec), held, served, num_engines, topology, mode, has_fan_out=has_fan_out)


def _as_dict(
    scenario: Scenario, topology: Topology, main: _Case, others: list[_Case], planning_s: float
) -> dict[str, Any]:
    return {
        "model": scenario.name,
        "trainer": scenario.trainer_spec,
        "engine": scenario.engine_spec,
        "num_trainer_ranks": main.traffic.num_trainers,
        "num_engine_ranks": main.traffic.num_engine_ranks,
        "topology": asdict(topology),
        "planning_s": planning_s,
        "prediction": asdict(main.prediction),
        "totals": _totals(main.traffic, topology),
        "engine_ranks": _engine_rows(main.traffic),
        "others": [
            {
                "layout": case.label,
                "prediction": asdict(case.prediction),
                "totals": _totals(case.traffic, topology),
            }
            for case in others
        ],
    }


def _totals(traffic: Traffic, topology: Topology) -> dict[str, Any]:
    egress = traffic.egress()
    return {
        "needed_nbytes": sum(traffic.needed.values()),
        "crossing_nbytes": sum(traffic.nic_in.values()),
        "fan_out_nbytes": sum(traffic.fan_in.values()),
        "num_reads": sum(traffic.num_reads.values()),
        "num_pairs": sum(map(len, traffic.pairs.values())),
        "trainer_egress_min_nbytes": min(egress),
        "trainer_egress_max_nbytes": max(egress),
        "trainer_imbalance": imbalance(egress),
        "engine_node_in_nbytes": dict(sorted(traffic.node_in(topology).items())),
        "engine_node_distinct_nbytes": dict(sorted(traffic.node_distinct.items())),
    }


def _engine_rows(traffic: Traffic) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "needed_nbytes": traffic.needed[rank],
            "nic_in_nbytes": traffic.nic_in[rank],
            "fan_in_nbytes": traffic.fan_in[rank],
            "num_reads": traffic.num_reads[rank],
            "num_trainer_ranks": len(traffic.pairs[rank]),
        }
        for rank in range(traffic.num_engine_ranks)
    ]


def _show(
    scenario: Scenario, topology: Topology, main: _Case, others: list[_Case], planning_s: float
) -> None:
    traffic, found = main.traffic, main.prediction
    needed, crossing = sum(traffic.needed.values()), sum(traffic.nic_in.values())
    print_lines(
        f"{scenario.name}: {scenario.trainer_spec} on {traffic.num_trainers} ranks to {scenario.num_engines} "
        f"engines {scenario.engine_spec} on {traffic.num_engine_ranks}",
        f"{show_bytes(needed)} needed, {show_bytes(crossing)} cross nodes, "
        f"{show_bytes(sum(traffic.fan_in.values()))} are copied inside engine nodes; "
        f"planned in {show_seconds(planning_s)}",
        f"{found.mode}: {found.mode_reason}",
    )
    print_table(
        "Predicted",
        ("phase", "#seconds", "while"),
        [
            ("publish", show_seconds(found.publish_s), "the trainer waits"),
            ("read", show_seconds(found.read_s), _standing(found)),
            ("fan out", show_seconds(found.fan_out_s), _standing(found)),
            ("commit", show_seconds(found.commit_s), "generation stands"),
            ("coordination", show_seconds(found.coordination_s), ""),
            ("total", show_seconds(found.total_s), f"stall {show_seconds(found.stall_s)}"),
        ],
    )
    _show_links(found, topology)
    egress = traffic.egress()
    print_lines(
        f"trainer egress {show_bytes(min(egress))} to {show_bytes(max(egress))} a rank, the largest "
        f"{found.trainer_imbalance:.1%} above the mean"
    )
    print_table(
        "What else",
        ("layout", "#cross", "#read", "#total", "waits for"),
        [
            (
                case.label,
                show_bytes(sum(case.traffic.nic_in.values())),
                show_seconds(case.prediction.read_s),
                show_seconds(case.prediction.total_s),
                case.prediction.bottleneck,
            )
            for case in (main, *others)
        ],
    )
    print_lines(
        "Fan-out is predicted for all that a node's ranks share; engines do it for ranks that land alike."
    )


def _standing(found: Prediction) -> str:
    return "generation goes on" if found.mode == "staged" else "generation stands"


def _show_links(found: Prediction, topology: Topology) -> None:
    rows = [
        (name, show_seconds(seconds), "the bottleneck" if name == found.bottleneck else "")
        for name, seconds in sorted(found.links.items(), key=lambda item: -item[1])
    ]
    print_table("Links, the busiest of each kind", ("link", "#seconds", ""), rows)
    if found.limit_s:
        print_lines(
            f"limit at line rate ({topology.nic_gbits_per_s:.0f} Gb/s a NIC, evenly loaded): "
            f"{show_seconds(found.limit_s)}"
        )
