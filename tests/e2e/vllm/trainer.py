"""A trainer of one rank as a plain process: ``python -m tests.e2e.vllm.trainer GROUP CHECKPOINT``.

Reads commands from stdin and answers each with one line: ``hello``, ``publish CHECKPOINT VERSION`` (write the
checkpoint's values over the tensors it holds, then publish), ``write CHECKPOINT`` (the same without
publishing).
"""

from __future__ import annotations

import sys
from pathlib import Path

from rdt_core.publisher import WeightPublisher
from tests.e2e.vllm.conftest import ANSWER
from tests.e2e.vllm.probe import CheckpointTrainer


def main() -> None:
    """Attach, then do as told until stdin ends."""
    group, folder = sys.argv[1], Path(sys.argv[2])
    trainer = CheckpointTrainer(folder)
    with WeightPublisher.attach(group, trainer.shards()) as publisher:
        for line in sys.stdin:
            answer = _carry_out(line.split(), trainer, publisher)
            print(ANSWER + answer, flush=True)  # noqa: T201  read by who started us


def _carry_out(words: list[str], trainer: CheckpointTrainer, publisher: WeightPublisher) -> str:
    match words:
        case ["hello"]:
            return "attached"
        case ["write", folder]:
            trainer.write(Path(folder))
            return "written"
        case ["publish", folder, version]:
            trainer.write(Path(folder))
            publisher.publish(int(version))
            return f"published {version}"
    raise ValueError(words)


if __name__ == "__main__":
    main()
