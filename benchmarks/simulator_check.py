"""The simulator against measured syncs of this machine: does a prediction come within a quarter?

    python benchmarks/simulator_check.py --json benchmarks/results/simulator-cpu.json

A prediction knows the layouts, this machine's copies (as `rdt doctor` measures them) and what a sync costs
that moves next to nothing; no number of the syncs that it is compared with goes into it. All of these are
taken in turn, round after round, and each round's sync is compared with the prediction from the same round's
copies: what else runs on the machine slows both. The verdict is the median over rounds of predicted over
measured. Exits with 1 when one is off by more than a quarter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from cases import CASES, QWEN3, SMOLLM2, Decoder
from rich.console import Console
from rich.table import Table
from sync import Setup, engine_process, machine, ray_cluster, versions
from trainer import TrainerGroup

from rdt_core import WeightSync
from rdt_core.link_speed import LocalCopy, RemoteMemory
from rdt_core.models.config import parse_config
from rdt_core.models.specs import ENGINES, TRAINERS, make_engine, make_trainer, parse_spec
from rdt_core.models.units import describe_model
from rdt_core.simulator.predict import predict
from rdt_core.simulator.topology import Topology
from rdt_core.simulator.traffic import plan_traffic

if TYPE_CHECKING:
    from rdt_core.simulator.traffic import Traffic

PHASES = ("prepare", "commit", "total")
TOLERANCE = 0.25
FIXED = CASES["tiny"]
WARM_UP = 3
Seconds = dict[str, float]


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


def traffic_of(case: Decoder) -> Traffic:
    """What one trainer rank gives one engine rank."""
    model = describe_model(parse_config(config_of(case)))
    trainer = make_trainer(parse_spec("fsdp:dp=1", TRAINERS), model)
    engine = make_engine(parse_spec("vllm", ENGINES), model)
    return plan_traffic(trainer, engine, 1, Topology(is_colocated=True), has_fan_out=True)


class Group:
    """One trainer rank, one engine process, and the driver between them. A context manager."""

    def __init__(self, case: str) -> None:
        setup = Setup(case=case, device="cpu", transport="nixl")
        self._version = 0
        with contextlib.ExitStack() as stack:
            self._trainers = TrainerGroup(case, setup.trainer_devices())
            stack.callback(self._trainers.close)
            self._trainers.attach(case)
            url = stack.enter_context(engine_process(setup, 0))
            self._sync = stack.enter_context(WeightSync.connect(case, engines=[url], mode="staged"))
            self._stack = stack.pop_all()

    def measure(self) -> Seconds:
        """Publish one more version and sync it; seconds by phase."""
        self._version += 1
        self._trainers.step()
        self._trainers.start_publish(self._version)()
        report = self._sync.update(version=self._version)
        return {"prepare": report.prepare_s, "commit": report.commit_s, "total": report.total_s}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What was measured together, and what follows from it.

    Args:
        copy_bytes_per_s, read_bytes_per_s: of plain copies, each byte counted once.
        fixed: of a sync of a megabyte.
        measured, predicted: of the case.
    """

    copy_bytes_per_s: float
    read_bytes_per_s: float
    fixed: Seconds
    measured: Seconds
    predicted: Seconds


def run_rounds(case: Decoder, count: int) -> list[Round]:
    """Copies, a sync of next to nothing and a sync of the case, in turn."""
    traffic, copy = traffic_of(case), LocalCopy()
    rounds = []
    with RemoteMemory() as remote, Group(FIXED.name) as small, Group(case.name) as large:
        for _ in range(count + WARM_UP):
            copies, reads = [copy.measure()], [remote.measure()]
            fixed = small.measure()
            measured = large.measure()
            copies.append(copy.measure())
            reads.append(remote.measure())
            copied, read = statistics.mean(copies), statistics.mean(reads)
            topology = Topology(
                is_colocated=True,
                copy_bytes_per_s=2 * copied,
                local_bytes_per_s=read,
                prepare_s=fixed["prepare"],
                commit_s=fixed["commit"],
                coordination_s=fixed["total"] - fixed["prepare"] - fixed["commit"],
            )
            found = predict(traffic, topology, mode="staged")
            rounds.append(
                Round(
                    copy_bytes_per_s=copied,
                    read_bytes_per_s=read,
                    fixed=fixed,
                    measured=measured,
                    predicted={
                        "prepare": found.read_s,
                        "commit": found.commit_s,
                        "total": found.total_s - found.publish_s,
                    },
                )
            )
    return rounds[WARM_UP:]


def summarize(case: Decoder, rounds: list[Round]) -> dict[str, Any]:
    """Medians, and the median of each phase's predicted over measured."""

    def median_of(side: str, phase: str) -> float:
        return statistics.median(float(getattr(one, side)[phase]) for one in rounds)

    return {
        "case": case.name,
        "config": config_of(case),
        "rounds": len(rounds),
        "copy_bytes_per_s": statistics.median(one.copy_bytes_per_s for one in rounds),
        "read_bytes_per_s": statistics.median(one.read_bytes_per_s for one in rounds),
        "fixed_s": {phase: median_of("fixed", phase) for phase in PHASES},
        "measured_s": {phase: median_of("measured", phase) for phase in PHASES},
        "predicted_s": {phase: median_of("predicted", phase) for phase in PHASES},
        "predicted_over_measured": {
            phase: statistics.median(one.predicted[phase] / one.measured[phase] for one in rounds)
            for phase in PHASES
        },
    }


def show(cases: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="predicted against measured, medians")
    for column in ("case", "phase", "measured ms", "predicted ms", "fixed ms", "predicted / measured"):
        table.add_column(column, justify="left" if column in ("case", "phase") else "right")
    for row in cases:
        for phase in PHASES:
            times = (f"{1e3 * row[side][phase]:.1f}" for side in ("measured_s", "predicted_s", "fixed_s"))
            table.add_row(row["case"], phase, *times, f"{row['predicted_over_measured'][phase]:.2f}")
    Console(width=100).print(table)


def main() -> None:
    """Measure, predict, print, and write what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "cases": []}
    # Here and, inherited, in every process: threads of one copy that wait for each other on cores that others
    # use as well take many times as long, and no speed tells how often that happens.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with ray_cluster():
        for case in (SMOLLM2, QWEN3):
            result["cases"].append(summarize(case, run_rounds(case, args.rounds)))
    show(result["cases"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    ratios = [ratio for row in result["cases"] for ratio in row["predicted_over_measured"].values()]
    sys.exit(int(any(abs(ratio - 1) > TOLERANCE for ratio in ratios)))


if __name__ == "__main__":
    main()
