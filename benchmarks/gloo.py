"""One side of a gloo broadcast; ``sync.py`` starts two of these."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import time

import torch
from cases import CASES
from torch import distributed


def main() -> None:
    """Broadcast a case's tensors several times; rank 0 prints the seconds of each as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--folder", required=True)
    args = parser.parse_args()
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{args.folder}/rendezvous",
        rank=args.rank,
        world_size=2,
        timeout=dt.timedelta(seconds=120),
    )
    tensors = [torch.zeros(shape, dtype=torch.bfloat16) for shape in CASES[args.case].shapes().values()]
    seconds = []
    for _ in range(args.runs):
        distributed.barrier()
        started = time.perf_counter()
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
        distributed.barrier()
        seconds.append(time.perf_counter() - started)
    distributed.destroy_process_group()
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
