"""A trainer rank that holds a whole Hugging Face model with random weights; an actor of the benchmarks."""

from __future__ import annotations

import itertools
import time

import torch

from rdt_core import LocalShard, LocalShards, Region, TensorSpec, WeightPublisher

STEP_S = 0.05
"""Of a step: long enough for a driver to ask engines meanwhile."""


class HfTrainer:
    """Goes to and fro between two sets of weights.

    Args:
        folder: where the first set is saved as a checkpoint, with a tokenizer.
        shape: fields of a Qwen3 configuration, with ``dtype``.
        device: where the weights lie.
    """

    def __init__(self, folder: str, shape: dict[str, object], device: str) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415  only in this actor

        self._dtype = str(shape["dtype"])
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, self._dtype))
        config = Qwen3Config(**shape)
        config.architectures = ["Qwen3ForCausalLM"]
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
        model.eval()
        model.save_pretrained(folder)
        save_tokenizer(folder)
        self._live = {name: parameter.data for name, parameter in model.named_parameters()}
        self._sets = [
            [data.clone() for data in self._live.values()],
            [data * 1.5 for data in self._live.values()],
        ]

    def attach(self, group: str) -> None:
        """Offer every parameter."""
        shards = tuple(
            LocalShard(
                spec=TensorSpec(name, tuple(data.shape), self._dtype),
                region=Region.whole(tuple(data.shape)),
                data=data,
                owner=name,
            )
            for name, data in self._live.items()
        )

        def locate() -> tuple[int, ...]:
            return tuple(data.data_ptr() for data in self._live.values())

        local = LocalShards(rank=0, world_size=1, shards=shards, locate=locate)
        self._publisher = WeightPublisher.attach(group, local)

    def publish(self, version: int) -> tuple[float, float]:
        """Take the first set of weights at odd versions, the second at even ones, and publish it.

        Returns:
            When ``publish`` began and ended, on the clock that processes of one host share.
        """
        time.sleep(STEP_S)  # stands for the step's own work; the clock starts after it
        self._take(version)
        started = time.perf_counter()
        self._publisher.publish(version)
        return started, time.perf_counter()

    def _take(self, version: int) -> None:
        for live, value in zip(self._live.values(), self._sets[(version + 1) % 2], strict=True):
            live.copy_(value)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def send_by_ipc(self, url: str, version: int) -> dict[str, float]:
        """Take the version's weights and have a vLLM of the backend ``ipc`` load them; seconds of its phases.

        vLLM's own trainer-side call between vLLM's own routes, with requests in flight kept.
        """
        import requests  # noqa: PLC0415  vLLM's own client
        from vllm.distributed.weight_transfer.ipc_engine import (  # noqa: PLC0415  only for this comparison
            IPCWeightTransferEngine,
        )

        self._take(version)
        times = [time.perf_counter()]

        def post(route: str) -> None:
            requests.post(url + route, timeout=60).raise_for_status()
            times.append(time.perf_counter())

        post("/pause?mode=keep")
        post("/start_weight_update")
        IPCWeightTransferEngine.trainer_send_weights(
            iter(self._live.items()), {"send_mode": "http", "url": url}
        )
        times.append(time.perf_counter())
        post("/finish_weight_update")
        post("/resume")
        phases = [after - before for before, after in itertools.pairwise(times)]
        names = ("pause", "start", "update", "finish", "resume")
        return {**dict(zip(names, phases, strict=True)), "end_to_end": times[-1] - times[0]}

    def close(self) -> None:
        """Leave the group."""
        self._publisher.close()


def save_tokenizer(folder: str) -> None:
    """Words ``w0`` to ``w999``; ids beyond them decode to nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))  # noqa: S106  a word
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)  # noqa: S106
