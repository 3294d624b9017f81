"""One rank of a GRPO trainer under torchrun: FSDP2, plain processes, no Ray actor.

    torchrun --nproc-per-node 2 train.py --model DIR --engine http://127.0.0.1:8000 --out rewards.json

Every rank offers its shards; rank 0 also asks the engine for rollouts and drives the syncs. Joining Ray is
all that a rank does with Ray: set RAY_ADDRESS, or start a cluster on this host.
"""

from __future__ import annotations

import argparse
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine import sample
from policy import load_policy, response_logprobs, reward_of
from torch.distributed.fsdp import fully_shard

from rdt_core import WeightPublisher, WeightSync
from rdt_megatron import fsdp_shards

GROUP = "policy"
PROMPTS = ([3, 141, 59], [26, 53, 58], [97, 93, 23], [84, 62, 64])
SAMPLES_A_PROMPT = 16
RESPONSE_TOKENS = 16
LEARNING_RATE = 6e-3
TIMEOUT_S = 300.0


def sample_rollouts(engine: str) -> list[dict[str, Any]]:
    """One row a response: tokens, reward, and the advantage over the other responses to its prompt."""
    rollouts = []
    for prompt in PROMPTS:
        responses = sample(engine, prompt, SAMPLES_A_PROMPT, RESPONSE_TOKENS)
        rewards = torch.tensor([reward_of(response) for response in responses])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        rollouts += [
            {"tokens": [*prompt, *response], "reward": float(reward), "advantage": float(advantage)}
            for response, reward, advantage in zip(responses, rewards, advantages, strict=True)
        ]
    return rollouts


def share(rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank 0's rollouts in every rank; others pass an empty list."""
    shared = [rollouts]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def policy_loss(model: Any, rollouts: list[dict[str, Any]]) -> torch.Tensor:
    """GRPO's loss where the sampling policy is the present one, which a sync after every step makes it."""
    tokens = torch.tensor([row["tokens"] for row in rollouts])
    advantages = torch.tensor([row["advantage"] for row in rollouts])
    logprobs = response_logprobs(model, tokens, tokens.shape[1] - RESPONSE_TOKENS)
    return -(logprobs.mean(1) * advantages).mean()


def train(model: Any, engine: str, num_steps: int) -> list[dict[str, Any]]:
    """The loop: rollouts, a step, a publish, a sync. Returns one row a step in rank 0."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    rows: list[dict[str, Any]] = []
    with WeightPublisher.attach(GROUP, fsdp_shards(model)) as publisher:
        dist.barrier()
        sync = WeightSync.connect(GROUP, engines=[engine], timeout_s=TIMEOUT_S) if rank == 0 else None
        for version in range(1, num_steps + 1):
            rollouts = share(sample_rollouts(engine) if rank == 0 else [])
            torch.autograd.backward(policy_loss(model, rollouts[rank::world_size]))
            with publisher.writing(timeout_s=TIMEOUT_S):
                optimizer.step()
            optimizer.zero_grad()
            publisher.publish(version)
            if sync is not None:
                report = sync.update(version, timeout_s=TIMEOUT_S)
                reward = sum(row["reward"] for row in rollouts) / len(rollouts)
                rows.append({"version": version, "reward": reward, "stall_s": report.stall_s})
                print(
                    f"version {version:2}  reward {reward:.3f}  sync {report.total_s * 1e3:.0f} ms",
                    flush=True,
                )
        if sync is not None:
            rows[-1]["bytes_equal"] = sync.verify().bytes_equal
            sync.close()
        dist.barrier()
    return rows


def main() -> None:
    """One rank, as torchrun starts it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    model = fully_shard(load_policy(args.model))
    rows = train(model, args.engine, args.steps)
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
