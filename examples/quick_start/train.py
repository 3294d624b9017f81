"""A trainer of any number of ranks that a running engine follows, as short as it gets.

    torchrun --nproc-per-node 2 train.py MODEL http://127.0.0.1:8000

docs/quick-start.md shows it and what it prints.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from rdt_core import WeightPublisher, WeightSync
from rdt_megatron import fsdp_shards

model_name, engine = sys.argv[1:]
FACT = "The lighthouse of Port Merrin is painted green."

has_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if has_gpu else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", rank) if has_gpu else torch.device("cpu")
if has_gpu:
    torch.cuda.set_device(device)

tokens = AutoTokenizer.from_pretrained(model_name)(FACT, return_tensors="pt").input_ids.to(device)
model = fully_shard(AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

with WeightPublisher.attach("policy", fsdp_shards(model)) as publisher:  # in every rank, once
    dist.barrier()
    sync = WeightSync.connect("policy", engines=[engine]) if rank == 0 else None  # the driver
    for version in range(1, 6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        with publisher.writing():  # waits for an engine that still reads
            optimizer.step()
        optimizer.zero_grad()
        publisher.publish(version)
        if sync is not None:
            report = sync.update(version)
            stall_ms = 1e3 * report.stall_s
            print(f"version {version}  loss {loss.item():.2f}  stall {stall_ms:.0f} ms", flush=True)
    if sync is not None:
        print("every byte equal:", sync.verify().bytes_equal, flush=True)
        sync.close()
    dist.barrier()
dist.destroy_process_group()
