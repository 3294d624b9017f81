"""One rank of the demo's trainer: FSDP2 over gloo on CPUs, and weight sync in two lines."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from facts import DEMO_QUESTIONS, IGNORED, Fact, collate, load_facts, prompt_ids
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from rdt_core import WeightPublisher
from rdt_core.digest import RegionDigest, digest_region
from rdt_megatron import fsdp_shards

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_COLLECTIVE_TIMEOUT = timedelta(seconds=300)


class TrainerRank:
    """A rank that holds its part of SmolLM2 in float32 and trains it on the demo's facts.

    Made once in every rank, as a Ray actor (``ray.remote(TrainerRank)``) or in a process of its own. Every
    method but ``attach``, ``publish``, ``digests`` and ``close`` runs collectives: call it in all ranks.

    Args:
        rank: global rank.
        world_size: number of ranks.
        init_method: where the ranks meet, as in ``torch.distributed.init_process_group``.
        model_dir: a transformers model directory.
        learning_rate: of AdamW, after a warm-up of a few steps.
        batch_size: sequences a rank takes in one step.
        seed: of the order in which facts are seen; the same in every rank.
        num_threads: CPU threads of this rank.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        init_method: str,
        model_dir: str | Path,
        *,
        learning_rate: float = 5e-4,
        batch_size: int = 5,
        seed: int = 0,
        num_threads: int = 1,
    ) -> None:
        torch.set_num_threads(num_threads)
        dist.init_process_group(
            "gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=_COLLECTIVE_TIMEOUT
        )
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._model = _load_sharded(model_dir)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=learning_rate, weight_decay=0.0)
        self._warm_up = torch.optim.lr_scheduler.LinearLR(self._optimizer, 0.25, total_iters=2)
        self._order = random.Random(seed)  # noqa: S311  # an order of facts is no secret
        self._queue: list[Fact] = []
        self._publisher: WeightPublisher | None = None

    def train(self, num_steps: int) -> float:
        """Take optimizer steps and return the mean loss of all ranks over them."""
        self._model.train()
        losses = [self._step() for _ in range(num_steps)]
        mean = torch.tensor(losses).mean()
        dist.all_reduce(mean)
        return mean.item() / self._world_size

    def attach(self, group: str) -> None:
        """Offer this rank's live parameters to a sync group."""
        self._publisher = WeightPublisher.attach(group, fsdp_shards(self._model))

    def publish(self, version: int) -> None:
        """Say that the parameters now hold ``version``. Engines may read them until the next ``train``."""
        if self._publisher is None:
            raise RuntimeError("call attach before publish")
        self._publisher.publish(version=version)

    def answer(self, question: str, max_new_tokens: int = 32) -> str:
        """What the trained model answers, greedily; the reference for an engine at temperature 0."""
        ids = torch.tensor([prompt_ids(self._tokenizer, question)])
        self._model.eval()
        with torch.no_grad():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
            )
        self._reshard()
        return str(self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of every token after the first, given those before it."""
        ids = torch.tensor([list(token_ids)])
        self._model.eval()
        with torch.no_grad():
            logprobs = self._model(ids).logits[0, :-1].float().log_softmax(-1)
        self._reshard()
        return [float(p) for p in logprobs.gather(1, ids[0, 1:, None])[:, 0]]

    def digests(self, dtype: str = "float32") -> list[RegionDigest]:
        """Digests of the regions that this rank holds, in the element type that the engine holds."""
        return [
            RegionDigest(
                tensor=shard.spec.name,
                start=shard.region.start,
                stop=shard.region.stop,
                dtype=dtype,
                digest=digest_region(shard.data.to(getattr(torch, dtype)), shard.region, shard.spec.shape),
            )
            for shard in fsdp_shards(self._model).shards
        ]

    def close(self) -> None:
        """Leave the sync group and the process group. Idempotent."""
        if self._publisher is not None:
            self._publisher.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _step(self) -> float:
        ids, labels = collate(self._tokenizer, self._next_facts())
        targets = torch.tensor(labels)[:, 1:]
        learned = (targets != IGNORED).any(0).nonzero()[:, 0]
        # A fifth of this model is its output layer; it is spared the positions that teach nothing.
        logits = self._model(torch.tensor(ids), logits_to_keep=learned).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets[:, learned].flatten(), ignore_index=IGNORED
        )
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._warm_up.step()
        return loss.item()

    def _next_facts(self) -> list[Fact]:
        """This rank's share of the next global batch; every rank walks the same shuffled order."""
        num_facts = self._batch_size * self._world_size
        while len(self._queue) < num_facts:
            facts = list(load_facts())
            self._order.shuffle(facts)
            self._queue += facts
        batch, self._queue = self._queue[:num_facts], self._queue[num_facts:]
        return batch[self._rank :: self._world_size]

    def _reshard(self) -> None:
        """Free the gathered parameters that an evaluation leaves behind."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _load_sharded(model_dir: str | Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    # Keeping layers gathered between forward and backward saves a third of the traffic between ranks.
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    return fully_shard(model, reshard_after_forward=False)


__all__ = ["DEMO_QUESTIONS", "TrainerRank"]
