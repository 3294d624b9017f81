"""A trainer of one rank as a plain process: ``python -m tests.e2e.trainer GROUP CHECKPOINT``.

Reads commands from stdin and answers each with one line: ``hello``, ``publish CHECKPOINT VERSION`` (write the
checkpoint's values over the tensors it holds, then publish), ``write CHECKPOINT`` (the same without
publishing).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from rdt_core.local_shards import LocalShard, LocalShards
from rdt_core.manifest import TensorSpec
from rdt_core.publisher import WeightPublisher
from rdt_core.region import Region
from tests.e2e.processes import ANSWER

if TYPE_CHECKING:
    import torch


class CheckpointTrainer:
    """Holds the tensors of one checkpoint at fixed addresses and takes on the values of others."""

    def __init__(self, folder: Path) -> None:
        self._tensors = load_file(folder / "model.safetensors")

    def shards(self) -> LocalShards:
        tensors = self._tensors

        def locate() -> tuple[int, ...]:
            return tuple(tensor.data_ptr() for tensor in tensors.values())

        shards = tuple(_whole(name, tensor) for name, tensor in tensors.items())
        return LocalShards(rank=0, world_size=1, shards=shards, locate=locate)

    def write(self, folder: Path) -> None:
        for name, tensor in load_file(folder / "model.safetensors").items():
            self._tensors[name].copy_(tensor)


def _whole(name: str, tensor: torch.Tensor) -> LocalShard:
    shape = tuple(tensor.shape)
    spec = TensorSpec(name, shape, str(tensor.dtype).removeprefix("torch."))
    return LocalShard(spec=spec, region=Region.whole(shape), data=tensor, owner=name)


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
