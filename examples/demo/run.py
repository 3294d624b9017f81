"""The main job on one machine: two FSDP2 ranks train a chat model, and running engines follow them.

    python -m nox -s demo                               (a vLLM server)
    python -m nox -s demo -- --engine sglang            (an SGLang server)
    python -m nox -s demo -- --engine vllm,sglang       (both at once, from one trainer)

Where everything is installed, ``python examples/demo/run.py`` does the same.

Exits with 1 when any proof fails: bytes that differ, or log-probabilities that do not agree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ray
from engine import ENGINES, EngineServer
from facts import DEMO_QUESTIONS, prompt_ids
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from smollm2 import MODEL_NAME, unpack_model
from trainer import TrainerRank
from transformers import AutoTokenizer

from rdt_core import WeightSync

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rdt_core import SyncReport

GROUP = "policy"
WORLD_SIZE = 2
TOLERANCE = 1e-3
CALL_TIMEOUT_S = 600.0
FIXED_TEXT = "The capital of France is Paris. Water boils at one hundred degrees Celsius at sea level."
console = Console(width=None if sys.stdout.isatty() else 108)


def get(refs: Any) -> Any:
    """``ray.get`` with a deadline."""
    return ray.get(refs, timeout=CALL_TIMEOUT_S)


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster of this run's own, ended with it."""
    # Ray keeps sockets below its temp dir, whose paths must stay short.
    with tempfile.TemporaryDirectory(prefix="rdt", dir="/tmp") as temp_dir:
        ray.init(
            address="local",
            num_cpus=WORLD_SIZE,
            include_dashboard=False,
            log_to_driver=False,
            namespace="rdt",
            object_store_memory=100 * 2**20,
            logging_level="error",
            _temp_dir=temp_dir,
        )
        try:
            yield
        finally:
            ray.shutdown()


class Trainers:
    """Two ranks as Ray actors; every method runs on both."""

    def __init__(self, model_dir: Path, rendezvous: Path) -> None:
        actor = ray.remote(TrainerRank).options(
            num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
        )
        self._ranks = [
            actor.remote(rank, WORLD_SIZE, f"file://{rendezvous}", str(model_dir))
            for rank in range(WORLD_SIZE)
        ]

    def attach(self) -> None:
        """Offer the live parameters."""
        get([rank.attach.remote(GROUP) for rank in self._ranks])

    def train(self, num_steps: int) -> float:
        """Take steps; returns the mean loss."""
        return float(get([rank.train.remote(num_steps) for rank in self._ranks])[0])

    def publish(self, version: int) -> None:
        """Say that the parameters hold a version."""
        get([rank.publish.remote(version) for rank in self._ranks])

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """What the model in training gives for a text."""
        return list(get([rank.logprobs.remote(token_ids) for rank in self._ranks])[0])

    def close(self) -> None:
        """Leave the group."""
        get([rank.close.remote() for rank in self._ranks])


class Steps:
    """Prints what is under way, and how long each step took once it is done."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(20),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """A step; strings appended to the yielded list are printed behind it."""
        started, notes = time.perf_counter(), list[str]()
        task = self._progress.add_task(what, total=None)
        try:
            yield notes
        finally:
            self._progress.remove_task(task)
        seconds = time.perf_counter() - started
        self._progress.console.print(
            f"[green]done[/] {seconds:6.1f} s  {what}  {'  '.join(notes)}", highlight=False
        )


def max_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Largest absolute difference of two equally long rows."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def sync_once(
    sync: WeightSync, trainers: Trainers, engines: Sequence[EngineServer], ids: Sequence[int], version: int
) -> Any:
    """Publish once, update every engine, prove; returns the report and a row for report.json."""
    trainers.publish(version)
    report = sync.update(version=version)
    verified = sync.verify()
    trained = trainers.logprobs(ids)
    row = {
        "version": version,
        "num_tensors": report.num_tensors,
        "nbytes": report.nbytes,
        "prepare_s": report.prepare_s,
        "commit_s": report.commit_s,
        "stall_s": report.stall_s,
        "bytes_equal": verified.bytes_equal and verified.nbytes * len(engines) == report.nbytes,
        "logprob_max_abs_diff": max(max_difference(engine.logprobs(ids), trained) for engine in engines),
    }
    for engine in engines:
        if engine.weight_version() != str(version):
            label = engine.weight_version()
            raise RuntimeError(f"{engine.name} labels its weights {label!r}, expected {version!r}")
    return report, row


def run(out: Path, models: Path, pythons: dict[str, Path], rounds: int, steps_a_round: int) -> dict[str, Any]:
    """The whole demo; returns what report.json holds.

    Args:
        out: for the engines' logs.
        models: where the model is unpacked.
        pythons: the interpreter of each engine, by its name.
        rounds: syncs.
        steps_a_round: optimizer steps before each.
    """
    names = " and ".join(pythons)
    with Steps() as steps, contextlib.ExitStack() as stack:
        with steps.step(f"unpack {MODEL_NAME}"):
            model_dir = unpack_model(models)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with steps.step("start Ray"):
            stack.enter_context(ray_cluster())
        with steps.step(f"start {names} with --weight-sync rdt, and {WORLD_SIZE} FSDP2 trainer ranks"):
            engines = [
                stack.enter_context(ENGINES[name](python, model_dir, out / f"{name}.log"))
                for name, python in pythons.items()
            ]
            trainers = Trainers(model_dir, folder / "rendezvous")
            trainers.attach()
            for engine in engines:
                engine.wait_ready()
        ids = prompt_ids(AutoTokenizer.from_pretrained(model_dir), FIXED_TEXT)
        with steps.step("ask the questions before any training"):
            before = ask_all(engines)
        with steps.step(f"connect trainers and {names}"):
            sync = stack.enter_context(WeightSync.connect(GROUP, engines=[e.url for e in engines]))
        reports: list[SyncReport] = []
        rows: list[dict[str, Any]] = []
        after = before
        for round_number in range(1, rounds + 1):
            version = round_number * steps_a_round
            with steps.step(f"round {round_number}/{rounds}: train {steps_a_round} steps") as notes:
                notes.append(f"loss {trainers.train(steps_a_round):.3f}")
            with steps.step(
                f"round {round_number}/{rounds}: sync version {version}, prove every byte"
            ) as notes:
                report, row = sync_once(sync, trainers, engines, ids, version)
                reports.append(report)
                rows.append(row)
                notes.append(f"commit {report.commit_s * 1e3:.0f} ms, bytes equal: {row['bytes_equal']}")
            with steps.step(f"round {round_number}/{rounds}: ask again"):
                after = ask_all(engines)
        versions = [engine.version() for engine in engines]
        sync.close()
        trainers.close()
    show(reports, rows, before, after)
    answers = [
        {"engine": name, "question": question, "before": old, "after": after[name, question]}
        for (name, question), old in before.items()
    ]
    transports = sorted(
        {name for report in reports for rank in report.ranks for name in rank.transports.values()}
    )
    return {
        "model": MODEL_NAME,
        "engine": ", ".join(versions),
        "transport": ",".join(transports),
        "versions": rows,
        "answers": answers,
    }


def ask_all(engines: Sequence[EngineServer]) -> dict[tuple[str, str], str]:
    """The greedy answers by engine and question."""
    return {
        (engine.name, question): engine.ask(question) for engine in engines for question in DEMO_QUESTIONS
    }


def show(
    reports: Sequence[SyncReport],
    rows: Sequence[dict[str, Any]],
    before: dict[tuple[str, str], str],
    after: dict[tuple[str, str], str],
) -> None:
    """Print the two tables."""
    table = Table(title="syncs")
    for column in (
        "version",
        "MB",
        "prepare s",
        "commit s",
        "stall s",
        "GB/s",
        "bytes equal",
        "max logprob diff",
    ):
        table.add_column(column, justify="right")
    for report, row in zip(reports, rows, strict=True):
        table.add_row(
            str(report.version),
            f"{report.nbytes / 1e6:.0f}",
            f"{report.prepare_s:.3f}",
            f"{report.commit_s:.3f}",
            f"{report.stall_s:.3f}",
            f"{report.gigabytes_per_s:.2f}",
            "yes" if row["bytes_equal"] else "[red]NO[/]",
            f"{row['logprob_max_abs_diff']:.1e}",
        )
    console.print(table)
    table = Table(title="answers", show_lines=True)
    for column in ("engine", "question", "before", f"after version {reports[-1].version}"):
        table.add_column(column)
    for (name, question), old in before.items():
        table.add_row(name, question, old, after[name, question])
    console.print(table)


def failed_proofs(report: dict[str, Any]) -> list[str]:
    """What report.json does not prove, in words."""
    failures = []
    for row in report["versions"]:
        if not row["bytes_equal"]:
            failures.append(f"version {row['version']}: bytes in an engine differ from the trainer's")
        if not row["logprob_max_abs_diff"] <= TOLERANCE:
            failures.append(
                f"version {row['version']}: log-probabilities differ by {row['logprob_max_abs_diff']}"
            )
    for name in dict.fromkeys(answer["engine"] for answer in report["answers"]):
        answers = [answer for answer in report["answers"] if answer["engine"] == name]
        if all(answer["before"] == answer["after"] for answer in answers):
            failures.append(f"no answer of {name} changed")
    return failures


def parse_engines(names: str) -> list[str]:
    """The engines named in ``vllm,sglang``."""
    chosen = names.split(",")
    if len(set(chosen)) != len(chosen) or not set(chosen) <= set(ENGINES):
        raise argparse.ArgumentTypeError(f"{names!r} is not one or more of {', '.join(ENGINES)}")
    return chosen


def main() -> int:
    """Run the demo; 0 when every proof holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engine", type=parse_engines, default=["vllm"], help="vllm (default), sglang, or vllm,sglang"
    )
    for name in ENGINES:
        parser.add_argument(
            f"--{name}-python",
            type=Path,
            default=Path(sys.executable),
            help=f"the interpreter beside which {name} is installed (default: this one)",
        )
    parser.add_argument("--rounds", type=int, default=3, help="syncs (default: 3)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps before each sync (default: 4)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="for report.json and logs")
    parser.add_argument(
        "--models", type=Path, default=Path("build/models"), help="where the model is unpacked"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # So that being ended from outside still ends the engine and the cluster.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    started = time.perf_counter()
    # Not resolved: a virtual environment's interpreter is a link, and knows its environment by the link.
    pythons = {name: getattr(args, f"{name}_python").absolute() for name in args.engine}
    report = run(args.out.resolve(), args.models.resolve(), pythons, args.rounds, args.steps)
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    failures = failed_proofs(report)
    for failure in failures:
        console.print(f"[red]proof failed[/] {failure}")
    console.print(f"report: {args.out / 'report.json'}   {time.perf_counter() - started:.0f} s in all")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
