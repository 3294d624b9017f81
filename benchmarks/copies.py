"""Ways to copy many byte ranges on one GPU: what a pull over CUDA IPC and a staged commit are made of.

python benchmarks/copies.py --json benchmarks/results/copies-h100.json
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cases import CASES
from sync import machine, versions

from rdt_core.row_blocks import RowBlock
from rdt_core.transports.fused_copy import FusedCopy

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS, WARM_UP = 25, 5
DEVICE = torch.device("cuda:0")


def measure(act: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the GPU, by events around the work."""
    make_event: Any = torch.cuda.Event
    values = []
    for _ in range(RUNS + WARM_UP):
        begin, end = (make_event(enable_timing=True) for _ in range(2))
        begin.record()
        act()
        end.record()
        end.synchronize()
        values.append(begin.elapsed_time(end))
    counted = values[WARM_UP:]
    return {
        "median_ms": round(statistics.median(counted), 3),
        "min_ms": round(min(counted), 3),
        "max_ms": round(max(counted), 3),
        "n": len(counted),
    }


def measure_model() -> dict[str, dict[str, float]]:
    """All tensors of Qwen3-0.6B."""
    shapes = CASES["qwen3-0.6b"].shapes().values()
    sources = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for shape in shapes]
    targets = [torch.zeros_like(source) for source in sources]
    fused = FusedCopy(
        [RowBlock(s.data_ptr(), t.data_ptr(), 2 * s.numel()) for s, t in zip(sources, targets, strict=True)],
        DEVICE,
    )
    flat = torch.cat([source.view(-1) for source in sources])
    other = torch.empty_like(flat)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch._foreach_copy_(targets, sources)
    stream = torch.cuda.current_stream()
    found = {
        "one flat buffer": measure(lambda: other.copy_(flat)),
        "310 tensors, one copy_ each": measure(
            lambda: [t.copy_(s) for s, t in zip(sources, targets, strict=True)]
        ),
        "310 tensors, foreach": measure(lambda: torch._foreach_copy_(targets, sources)),
        "310 tensors, foreach in a CUDA graph": measure(graph.replay),
        "310 tensors, one launch of ours": measure(lambda: fused.launch(stream)),
    }
    if not all(torch.equal(s, t) for s, t in zip(sources, targets, strict=True)):
        raise SystemExit("a copy brought other bytes")
    return found


def measure_ranges() -> dict[str, dict[str, float]]:
    """Many small ranges: 37,000 of 32 KiB, and 200,000 rows of a column block."""
    count, nbytes = 37_000, 32_768
    sources = torch.randint(0, 256, (count * nbytes,), dtype=torch.uint8, device=DEVICE)
    targets = torch.empty_like(sources)
    first, second, stream = sources.data_ptr(), targets.data_ptr(), torch.cuda.current_stream()
    many = FusedCopy(
        [RowBlock(first + i * nbytes, second + i * nbytes, nbytes) for i in range(count)], DEVICE
    )
    ranges = FusedCopy([RowBlock(first + i * 3072, second + i * 1536, 1536) for i in range(200_000)], DEVICE)
    rows = FusedCopy([RowBlock(first, second, 1536, 200_000, 3072, 1536)], DEVICE)
    block = sources[: 200_000 * 3072].view(200_000, 3072)[:, :1536]
    packed = targets[: 200_000 * 1536].view(200_000, 1536)
    return {
        "37,000 ranges of 32 KiB, one launch of ours": measure(lambda: many.launch(stream)),
        "200,000 ranges of 1,536 bytes, one launch of ours": measure(lambda: ranges.launch(stream)),
        "200,000 rows of 1,536 bytes, one launch of ours": measure(lambda: rows.launch(stream)),
        "200,000 rows of 1,536 bytes, torch's copy_": measure(lambda: packed.copy_(block)),
    }


def measure_between_gpus() -> dict[str, dict[str, float]]:
    """1.5 GB read from another GPU: end to end, as rows of what lies there, and by the copy engine."""
    near, far = torch.device("cuda:1"), torch.device("cuda:0")
    nbytes = 1_500_000_000
    sources = torch.randint(0, 256, (2 * nbytes,), dtype=torch.uint8, device=far)
    targets = torch.zeros(nbytes, dtype=torch.uint8, device=near)
    # torch lets the GPUs see each other's memory when it copies, a direction at a time.
    targets[:64].copy_(sources[:64])
    sources[:64].copy_(targets[:64])
    return measure_rows(sources, targets) | measure_copy_engine(sources, targets)


def measure_rows(sources: torch.Tensor, targets: torch.Tensor) -> dict[str, dict[str, float]]:
    """Every second row of the sources, by our kernel."""
    near, nbytes = targets.device, len(targets)
    found = {}
    with torch.cuda.device(near):
        stream = torch.cuda.current_stream(near)
        found["1.5 GB from a peer, torch's copy_"] = measure(lambda: targets.copy_(sources[:nbytes]))
        for row_nbytes in (nbytes, 8192, 3072, 1536, 768, 256, 64, 16):
            num_rows = nbytes // row_nbytes
            block = RowBlock(
                sources.data_ptr(), targets.data_ptr(), row_nbytes, num_rows, 2 * row_nbytes, row_nbytes
            )
            fused = FusedCopy([block], near)
            name = f"1.5 GB from a peer, {num_rows:,} rows of {row_nbytes:,} bytes"
            found[name] = measure(functools.partial(fused.launch, stream))
            whole = sources[: 2 * num_rows * row_nbytes].view(num_rows, 2, row_nbytes)[:, 0].to(near)
            if not torch.equal(whole.reshape(-1), targets[: num_rows * row_nbytes]):
                raise SystemExit(f"{name}: other bytes came")
    return found


class _Hint(ctypes.Structure):
    """``CUmemcpyAttributes``: in the stream's order; no locations, no flags."""

    _fields_ = (("order", ctypes.c_int), ("locations", ctypes.c_int * 4), ("flags", ctypes.c_uint))


def measure_copy_engine(sources: torch.Tensor, targets: torch.Tensor) -> dict[str, dict[str, float]]:
    """The same bytes in pieces, a batch of copies on each of four streams."""
    near, driver = targets.device, ctypes.CDLL("libcuda.so.1")
    found = {}
    with torch.cuda.device(near):
        streams = [torch.cuda.Stream(near) for _ in range(4)]  # type: ignore[no-untyped-call]  # torch's own
        for piece in (64 << 20, 6 << 20, 3 << 20, 1 << 20, 64 << 10):
            count = len(targets) // piece
            batches = [_batch(sources, targets, piece, range(first, count, 4)) for first in range(4)]

            def copy(batches: list[tuple[Any, ...]] = batches) -> None:
                current = torch.cuda.current_stream(near)
                for stream, batch in zip(streams, batches, strict=True):
                    stream.wait_stream(current)
                    code = driver.cuMemcpyBatchAsync_v2(*batch, ctypes.c_void_p(stream.cuda_stream))
                    if code:
                        raise SystemExit(f"the driver's copy of a batch answered {code}")
                for stream in streams:
                    current.wait_stream(stream)

            targets.zero_()
            name = f"1.5 GB from a peer, {count:,} pieces of {piece >> 10:,} KiB by the copy engine"
            found[name] = measure(copy)
            if not torch.equal(sources[: count * piece].to(near), targets[: count * piece]):
                raise SystemExit(f"{name}: other bytes came")
    return found


def _batch(sources: torch.Tensor, targets: torch.Tensor, piece: int, numbers: range) -> tuple[Any, ...]:
    """What the driver's function takes before the stream."""
    addresses = [
        (ctypes.c_uint64 * len(numbers))(*[tensor.data_ptr() + piece * number for number in numbers])
        for tensor in (targets, sources)
    ]
    sizes, first = (ctypes.c_size_t * len(numbers))(*[piece] * len(numbers)), (ctypes.c_size_t * 1)(0)
    hint = _Hint(1)
    return *addresses, sizes, ctypes.c_size_t(len(numbers)), ctypes.byref(hint), first, ctypes.c_size_t(1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "versions": versions()}
    result["results"] = {**measure_model(), **measure_ranges()}
    if torch.cuda.device_count() > 1:
        result["results"] |= measure_between_gpus()
    for name, found in result["results"].items():
        print(f"{name:55} {found['median_ms']:.3f} ({found['min_ms']:.3f} to {found['max_ms']:.3f})")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
