"""One side of a collective transfer (gloo or NCCL); ``references.py`` starts two of these."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def main() -> None:
    """Move a case's tensors from rank 0 to rank 1 several times; rank 0 prints the seconds of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--how", choices=["broadcast", "send"], default="broadcast")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:N")
    args = parser.parse_args()
    # A virtual machine's GPUs are not to use NVLink multicast.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    import torch  # noqa: PLC0415  after the environment that it reads
    from cases import CASES  # noqa: PLC0415
    from torch import distributed  # noqa: PLC0415

    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        args.backend,
        init_method=f"file://{args.folder}/rendezvous",
        rank=args.rank,
        world_size=2,
        timeout=dt.timedelta(seconds=120),
    )
    tensors = [
        torch.zeros(shape, dtype=torch.bfloat16, device=device)
        for shape in CASES[args.case].shapes().values()
    ]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()

    def move(tensor: torch.Tensor) -> None:
        if args.how == "broadcast":
            distributed.broadcast(tensor, src=0)
        elif args.rank == 0:
            distributed.send(tensor, dst=1)
        else:
            distributed.recv(tensor, src=0)

    def move_all() -> None:
        if args.backend == "nccl" and args.how == "send":
            operation = distributed.isend if args.rank == 0 else distributed.irecv
            moves = [distributed.P2POp(operation, tensor, 1 - args.rank) for tensor in tensors]
            for work in distributed.batch_isend_irecv(moves):
                work.wait()
            return
        for tensor in tensors:
            move(tensor)

    seconds = []
    for _ in range(args.runs):
        wait()
        started = time.perf_counter()
        move_all()
        wait()
        seconds.append(time.perf_counter() - started)
    distributed.destroy_process_group()
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
