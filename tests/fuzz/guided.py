"""The byte-eating targets once more, led by which lines they reach: ``python -m tests.fuzz.guided``.

Needs atheris. Ends with libFuzzer's own report and an exit status that is not 0 when a target raises what is
no error of ours, takes longer than a second or more than 512 MB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris  # type: ignore[import-untyped]  # nox -s fuzz installs it

with atheris.instrument_imports(include=["rdt_core"]):
    from tests.fuzz.targets import make_byte_targets

LIMITS = ("-timeout=1", "-rss_limit_mb=512", "-max_len=4096", "-print_final_stats=1", "-verbosity=0")


def main() -> None:
    """Run; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    targets, samples = make_byte_targets()
    counts: Counter[str] = Counter()

    def feed(data: bytes) -> None:
        """The first byte says which target the others are for."""
        target = targets[data[0] % len(targets)] if data else targets[0]
        error = target.feed(data[1:])
        counts[f"{target.name}: {type(error).__name__ if error else 'taken'}"] += 1
        if sum(counts.values()) == arguments.inputs:
            print(*(f"{count:>7}  {name}" for name, count in sorted(counts.items())), sep="\n", flush=True)  # noqa: T201

    with tempfile.TemporaryDirectory() as corpus:
        for number, (index, data) in enumerate(samples):
            (Path(corpus) / str(number)).write_bytes(bytes([index]) + data)
        options = [f"-runs={arguments.inputs}", f"-seed={arguments.seed}", *LIMITS, corpus]
        atheris.Setup([sys.argv[0], *options], feed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
