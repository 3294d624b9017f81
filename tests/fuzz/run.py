"""Feeds every target with malformed input and prints what came of it: ``python -m tests.fuzz.run``.

Ends with an error at the first input that a target neither takes nor refuses by one of our errors (shrunk to
a small one), and with 1 when an input took too long or a target's memory grew too much.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.targets import make_pure_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.fuzz.targets import Target

SLOWEST_S = 5.0
"""No single input may take longer, on a machine that has other things to do."""

PEAK_MB = 256
"""By no more may a process grow over all inputs of a target; the hypothesis library takes a part of it."""

BATCH = 2_000
"""Inputs between two starts of hypothesis, which remembers all that it has drawn."""


@dataclass(slots=True)
class Result:
    """What came of one target.

    Args:
        name: of the target.
        num_inputs: that it was fed.
        refused: how many of them with which type of error.
        slowest_s: the longest that one took.
        peak_mb: growth of the process's highest resident memory.
    """

    name: str
    num_inputs: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    peak_mb: float = 0.0

    @property
    def is_bounded(self) -> bool:
        """Whether time and memory stayed within the bounds."""
        return self.slowest_s <= SLOWEST_S and self.peak_mb <= PEAK_MB


def fuzz(target: Target, num_inputs: int, first_seed: int) -> Result:
    """Feed one target. The same numbers give the same inputs.

    Raises:
        BaseException: whatever the target raised that is no error of ours.
    """
    result = Result(target.name)
    before_mb = _peak_mb()
    while result.num_inputs < num_inputs:
        _feed_batch(
            target, min(BATCH, num_inputs - result.num_inputs), first_seed + result.num_inputs, result
        )
    result.peak_mb = _peak_mb() - before_mb
    return result


def _feed_batch(target: Target, num_inputs: int, batch_seed: int, result: Result) -> None:
    before = result.num_inputs

    @seed(batch_seed)
    @settings(max_examples=num_inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def feed(value: Any) -> None:
        started = time.perf_counter()
        error = target.feed(value)
        result.slowest_s = max(result.slowest_s, time.perf_counter() - started)
        result.num_inputs += 1
        if error is not None:
            result.refused[type(error).__name__] += 1

    feed()
    if result.num_inputs == before:
        raise RuntimeError(f"hypothesis has no more inputs for {target.name}")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def show(results: Sequence[Result]) -> str:
    """The table."""
    rows = ["target                        inputs   slowest ms   peak MB   refused by type"]
    for row in results:
        kinds = ", ".join(f"{count} {name}" for name, count in row.refused.most_common())
        rows.append(
            f"{row.name:<28} {row.num_inputs:>7} {row.slowest_s * 1e3:>12.1f} {row.peak_mb:>9.1f}   {kinds}"
        )
    return "\n".join(rows)


def main() -> int:
    """Run and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from tests.fuzz.engine_targets import make_engine_targets

    with make_engine_targets() as more:
        targets = [*make_pure_targets(), *more]
        results = [fuzz(target, -(-arguments.inputs // len(targets)), arguments.seed) for target in targets]
    print(show(results))  # noqa: T201  a command's own output
    print(f"{sum(row.num_inputs for row in results)} inputs")  # noqa: T201
    return int(not all(row.is_bounded for row in results))


if __name__ == "__main__":
    sys.exit(main())
