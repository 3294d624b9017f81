"""The simulator against measured syncs of this machine: speeds and syncs taken in turn, then compared.

    python benchmarks/simulator_check.py --json benchmarks/results/simulator-cpu.json

A prediction knows the layouts, the speeds that `rdt doctor` measures and a topology's fixed costs; no number
of these syncs goes into it. Speeds and syncs alternate, so that what else runs on the machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cases import QWEN3, SMOLLM2, Decoder
from rich.console import Console
from rich.table import Table
from sync import Setup, engine_process, machine, ray_cluster, versions
from trainer import TrainerGroup

from rdt_core import WeightSync
from rdt_core.link_speed import measure_speeds
from rdt_core.models.config import parse_config
from rdt_core.models.specs import ENGINES, TRAINERS, make_engine, make_trainer, parse_spec
from rdt_core.models.units import describe_model
from rdt_core.simulator.predict import predict
from rdt_core.simulator.topology import Topology
from rdt_core.simulator.traffic import plan_traffic

PHASES = ("prepare", "commit", "total")
SYNCS_A_ROUND = 3


def config_of(values: Decoder) -> dict[str, Any]:
    """The case as a config.json."""
    return {
        "model_type": "qwen3" if values.has_qk_norm else "llama",
        "vocab_size": values.vocab,
        "hidden_size": values.hidden,
        "intermediate_size": values.intermediate,
        "num_hidden_layers": values.layers,
        "num_attention_heads": values.heads,
        "num_key_value_heads": values.kv_heads,
        "head_dim": values.head_dim,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def predict_case(case: Decoder, speeds: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, from layouts and speeds."""
    model = describe_model(parse_config(config_of(case)))
    trainer = make_trainer(parse_spec("fsdp:dp=1", TRAINERS), model)
    engine = make_engine(parse_spec("vllm", ENGINES), model)
    topology = Topology.of_one_machine(
        copy_bytes_per_s=2 * speeds["copy in one process"],
        local_bytes_per_s=speeds["read another process"],
    )
    found = predict(plan_traffic(trainer, engine, 1, topology, has_fan_out=True), topology, mode="staged")
    return {
        "prepare": found.read_s,
        "commit": found.commit_s,
        "total": found.total_s - found.publish_s,
    }


def measure_case(case: str, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of speeds and of phases, taken in turn."""
    setup = Setup(case=case, device="cpu", transport="nixl")
    trainers = TrainerGroup(case, setup.trainer_devices())
    trainers.attach(case)
    speeds: dict[str, list[float]] = {}
    phases: dict[str, list[float]] = {name: [] for name in PHASES}
    version = 0
    with engine_process(setup, 0) as url, WeightSync.connect(case, engines=[url]) as sync:
        for number in range(rounds + 1):
            for speed in measure_speeds():
                speeds.setdefault(speed.name, []).append(speed.bytes_per_s or 0.0)
            for _ in range(SYNCS_A_ROUND):
                version += 1
                trainers.step_and_publish(version)
                report = sync.update(version=version)
                if number:  # the first round warms up
                    phases["prepare"].append(report.ranks[0].prepare_s)
                    phases["commit"].append(report.commit_s)
                    phases["total"].append(report.total_s)
    trainers.close()
    return (
        {name: statistics.median(values) for name, values in speeds.items()},
        {name: statistics.median(values) for name, values in phases.items()},
    )


def main() -> None:
    """Measure, predict, print, and write what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "cases": []}
    with ray_cluster():
        for case in (SMOLLM2, QWEN3):
            speeds, measured = measure_case(case.name, args.rounds)
            result["cases"].append(
                {
                    "case": case.name,
                    "config": config_of(case),
                    "speeds_bytes_per_s": speeds,
                    "measured_s": measured,
                    "predicted_s": predict_case(case, speeds),
                }
            )
    table = Table(title="predicted against measured")
    for column in ("case", "phase", "measured ms", "predicted ms", "off by"):
        table.add_column(column, justify="left" if column in ("case", "phase") else "right")
    for row in result["cases"]:
        for phase in PHASES:
            measured_s, predicted_s = row["measured_s"][phase], row["predicted_s"][phase]
            off = predicted_s / measured_s - 1
            table.add_row(
                row["case"], phase, f"{1e3 * measured_s:.1f}", f"{1e3 * predicted_s:.1f}", f"{off:+.0%}"
            )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
