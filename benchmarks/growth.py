"""How a sync grows with bytes and with tensors, beside the copy that is its limit.

Drawn by ``growth_plot.py``.

    python benchmarks/growth.py --device cuda --json benchmarks/results/growth-h100.json

Each point is syncs of its own trainers and engines, in place unless it says otherwise, measured as sync.py
measures them. The limit is one copy of the same bytes in one process, from one flat buffer to another.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from cases import CASES, num_bytes
from references import measure_copy
from sync import Setup, console, machine, measure_ours, ray_cluster, rows_of, versions

BY_BYTES = ("0.1gb", "0.3gb", "qwen3-0.6b", "8gb", "24gb")
BY_TENSORS = ("310-tensors", "3000-tensors", "37000-tensors")
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{case: (case, "inplace", {}) for case in (*BY_BYTES, *BY_TENSORS)},
    "staged": ("qwen3-0.6b", "staged", {}),
    "column blocks": ("qwen3-0.6b", "inplace", {"trainers": 2, "engines": 4}),
    "fp32 into bf16": ("qwen3-0.6b", "inplace", {"dtype": "float32"}),
}
"""By name: case, mode and what differs from one trainer rank and one engine rank in bf16."""

PHASES = ("publish", "prepare", "read", "commit", "stall", "from_publish", "end_to_end")


def measure(kind: str, device: str, transport: str, runs: int) -> dict[str, Any]:
    """One point: our phases and the limit."""
    case, mode, differs = KINDS[kind]
    setup = Setup(case=case, device=device, transport=transport, **differs)
    measured, facts = measure_ours(setup, runs + 3, mode)
    rows = [
        row for path, samples in measured.items() for row in rows_of(path, samples) if row["phase"] in PHASES
    ]
    rows += rows_of("copy_in_process", measure_copy(case, runs + 3, (device_of(device), device_of(device))))
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return {
        "name": kind,
        "case": case,
        "mode": mode,
        "trainers": setup.trainers,
        "engines": setup.engines,
        "dtype": setup.dtype,
        "nbytes": num_bytes(case),
        "num_tensors": len(CASES[case].shapes()),
        "results": rows,
        "facts": facts,
    }


def device_of(device: str) -> str:
    """As a process that sees every GPU names the first."""
    return device if device == "cpu" else "cuda:0"


def main() -> None:
    """Measure every point, and write after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--transport", help="by default cuda_ipc on CUDA, nixl on CPU")
    parser.add_argument("--only", help="points by comma; by default all")
    parser.add_argument("--runs", type=int, default=20, help="counted syncs of each point, after warm-up")
    parser.add_argument("--json", type=Path, help="write the result here, after every point")
    args = parser.parse_args()
    transport = args.transport or ("cuda_ipc" if args.device == "cuda" else "nixl")
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "points": []}
    with ray_cluster():
        for kind in args.only.split(",") if args.only else KINDS:
            console.print(kind)
            result["points"].append(measure(kind, args.device, transport, args.runs))
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps([[p["name"], p["results"]] for p in result["points"]]))


if __name__ == "__main__":
    main()
