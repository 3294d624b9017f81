"""What CUDA IPC promises beyond the contract, and what of it can be told without a GPU."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack
import pytest
import torch

from rdt_core.errors import SourceDiedError, TransportError, TransportUnavailableError
from rdt_core.local_copies import LocalCopies
from rdt_core.row_blocks import RowBlock, Rows
from rdt_core.transports import make_transport
from rdt_core.transports.cuda_ipc import CudaIpcTicket
from rdt_core.transports.fused_copy import CHUNK_BYTES, FusedCopy, cut_chunks
from tests.contract.sources import ActorSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rdt_core.transports.base import Link

TIMEOUT_S = 30.0
TICKET = CudaIpcTicket(host="h", device="GPU-1", anchor="a", handles=(b"x" * 64,), ranges=bytes(40))

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")


def test_a_ticket_survives_the_wire() -> None:
    assert CudaIpcTicket.parse(TICKET.as_bytes()) == TICKET
    assert TICKET.rows() == [(0, Rows(0, 0, 0, 0))]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        7,
        None,
        msgpack.packb({"cuda_ipc": 1}),
        msgpack.packb({"cuda_ipc": 2, "host": "h"}),
        msgpack.packb(
            {"cuda_ipc": 2, "host": "h", "device": "", "anchor": "", "handles": [], "ranges": b"123"}
        ),
        msgpack.packb([1, 2]),
    ],
)
def test_what_is_no_ticket_is_a_typed_error(raw: object) -> None:
    with pytest.raises(TransportError, match="not a ticket"):
        CudaIpcTicket.parse(raw)


def test_chunks_are_the_blocks_cut_and_nothing_else() -> None:
    blocks = [
        RowBlock(100, 5000, 3),
        RowBlock(10_000, 50_000, 2 * CHUNK_BYTES + 1),
        RowBlock(7, 9, 0),
        RowBlock(200_000, 300_000, 768, 100, 1536, 768),
        RowBlock(700_000, 900_000, CHUNK_BYTES + 5, 3, 2 * CHUNK_BYTES, CHUNK_BYTES + 5),
    ]
    chunks = [RowBlock(*chunk) for chunk in cut_chunks(blocks).tolist()]
    assert max(chunk.nbytes for chunk in chunks) == CHUNK_BYTES
    assert bytes_moved(chunks) == bytes_moved(blocks)
    assert len(cut_chunks([])) == 0
    assert len(bytes_moved(blocks)) == sum(block.nbytes for block in blocks)


def bytes_moved(blocks: Sequence[RowBlock]) -> dict[int, int]:
    """Which byte of the source goes to each byte of the target."""
    return {
        block.target + row * block.target_pitch + at: block.source + row * block.source_pitch + at
        for block in blocks
        for row in range(block.num_rows)
        for at in range(block.row_nbytes)
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
def test_without_a_gpu_the_transport_says_so_and_names_another() -> None:
    with pytest.raises(TransportUnavailableError, match="nixl"):
        make_transport("cuda_ipc")


@pytest.mark.cuda
@needs_gpu
def test_one_launch_copies_ranges_of_any_alignment_and_nothing_beside_them() -> None:
    rng = random.Random(0)  # noqa: S311  a case must come out alike every time
    source = torch.randint(0, 256, (1 << 22,), dtype=torch.uint8, device="cuda")
    target = torch.full((1 << 22,), 255, dtype=torch.uint8, device="cuda")
    wanted = target.clone()
    blocks = []
    at = 0
    while at < (1 << 22) - 300_000:
        start, nbytes = rng.randrange(1 << 21), rng.choice([0, 1, 3, 15, 16, 17, 100, 4096, 70_001, 200_000])
        blocks.append(RowBlock(source.data_ptr() + start, target.data_ptr() + at, nbytes))
        wanted[at : at + nbytes] = source[start : start + nbytes]
        at += nbytes + rng.randrange(40)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
    FusedCopy(blocks, target.device).launch(stream)
    stream.synchronize()
    assert torch.equal(target, wanted)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_one_launch_copies_boxes_of_any_stride_as_torch_does(dtype: torch.dtype) -> None:
    rng = random.Random(0)  # noqa: S311  a case must come out alike every time
    pairs, wanted = [], []
    for _ in range(60):
        shape = [rng.randrange(1, 60) for _ in range(rng.randrange(1, 4))]
        size = [n + rng.randrange(8) for n in shape]
        starts = [rng.randrange(whole - n + 1) for n, whole in zip(shape, size, strict=True)]
        source, target = (torch.randint(0, 99, size, device="cuda").to(dtype) for _ in range(2))
        box = tuple(slice(start, start + n) for start, n in zip(starts, shape, strict=True))
        inner = tuple(slice(n) for n in shape)
        wanted.append(target.clone())
        wanted[-1][inner] = source[box]
        pairs.append((target, target[inner], source[box]))
    LocalCopies([(into, source) for _, into, source in pairs]).run()
    for (target, _, _), expected in zip(pairs, wanted, strict=True):
        assert torch.equal(target, expected)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.usefixtures("ray_cluster")
class TestBetweenProcesses:
    """With a source in another process."""

    def make(self, sizes: Sequence[int]) -> tuple[ActorSource, list[torch.Tensor]]:
        return ActorSource("cuda_ipc", sizes), [
            torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in sizes
        ]

    def pull_until_it_fails(self, link: Link, target: torch.Tensor, wanted: list[int]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            target.fill_(255)
            link.pull(1, timeout_s=TIMEOUT_S)
            assert target.tolist() == wanted

    def test_a_killed_source_leaves_this_process_its_gpu(self) -> None:
        source, targets = self.make((1 << 20, 3))
        source.write(1, [1, 2, 3])
        link = make_transport("cuda_ipc").open(source.export(), targets, trainer_rank=2)
        link.pull(1, timeout_s=TIMEOUT_S)
        source.kill()
        with pytest.raises(SourceDiedError, match="trainer rank 2"):
            link.pull(2, timeout_s=TIMEOUT_S)
        link.close()
        torch.cuda.synchronize()
        assert targets[1].tolist() == [1, 2, 3]

    def test_a_source_killed_in_mid_read_is_a_typed_error_and_what_came_before_was_right(self) -> None:
        source, targets = self.make((1 << 30, 3))
        source.write(1, [1, 2, 3])
        link = make_transport("cuda_ipc").open(source.export(), targets, trainer_rank=4)
        link.pull(1, timeout_s=TIMEOUT_S)
        killer = threading.Timer(0.2, os.kill, (source.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(SourceDiedError, match="trainer rank 4"):
            self.pull_until_it_fails(link, targets[1], [1, 2, 3])
        killer.join()
        link.close()
        torch.cuda.synchronize()

    def test_a_source_that_is_stopped_stops_no_reader(self) -> None:
        source, targets = self.make((1 << 20, 3))
        source.write(1, [7, 8, 9])
        link = make_transport("cuda_ipc").open(source.export(), targets, trainer_rank=0)
        os.kill(source.pid, signal.SIGSTOP)
        try:
            link.pull(1, timeout_s=TIMEOUT_S)
        finally:
            os.kill(source.pid, signal.SIGCONT)
        assert targets[1].tolist() == [7, 8, 9]
        link.close()
        source.kill()

    def test_sides_that_name_their_gpu_in_other_ways_read_the_same(self) -> None:
        """The source's process sees its GPU under its UUID, this one as the first of all."""
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        source = ActorSource("cuda_ipc", (1 << 20, 3), {"CUDA_VISIBLE_DEVICES": uuid})
        source.write(1, [4, 5, 6])
        targets = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in (1 << 20, 3)]
        link = make_transport("cuda_ipc").open(source.export(), targets, trainer_rank=0)
        link.pull(1, timeout_s=TIMEOUT_S)
        assert targets[1].tolist() == [4, 5, 6]
        link.close()
        source.kill()

    def test_a_closed_export_is_never_read_again(self) -> None:
        source, targets = self.make((64,))
        link = make_transport("cuda_ipc").open(source.export(), targets, trainer_rank=1)
        source.close()
        with pytest.raises(SourceDiedError, match="export was closed"):
            link.pull(1, timeout_s=TIMEOUT_S)
        link.close()
        source.kill()

    def test_memory_freed_while_exported_is_refused_before_it_is_published(self) -> None:
        source, targets = self.make((1 << 20,))
        link = make_transport("cuda_ipc").open(source.export(), targets, trainer_rank=0)
        source.free(0)
        with pytest.raises(Exception, match="freed or resized"):
            source.publish(2)
        link.close()
        source.kill()

    def test_a_thousand_links_leave_no_descriptor_and_no_memory_behind(self) -> None:
        source, targets = self.make((1 << 21, 5))
        transport = make_transport("cuda_ipc")
        transport.open(source.export(), targets, trainer_rank=0).close()
        fds, free = len(list(Path("/proc/self/fd").iterdir())), torch.cuda.mem_get_info()[0]
        for _ in range(1000):
            link = transport.open(source.export(), targets, trainer_rank=0)
            link.pull(0, timeout_s=TIMEOUT_S)
            link.close()
            source.close()
        assert len(list(Path("/proc/self/fd").iterdir())) - fds < 10
        assert free - torch.cuda.mem_get_info()[0] < 64 * 2**20
        source.kill()


EXPANDABLE = """
import torch
from rdt_core.errors import TransportError
from rdt_core.local_copies import LocalCopies
from rdt_core.row_blocks import RowBlock
from rdt_core.transports import make_transport
try:
    make_transport("cuda_ipc").export([torch.zeros(1 << 22, dtype=torch.uint8, device="cuda")])
except TransportError as error:
    print(type(error).__name__, error)
else:
    print("shared")
"""


@pytest.mark.cuda
@needs_gpu
def test_expandable_segments_are_refused_by_name() -> None:
    settings = dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True")
    done = subprocess.run(
        [sys.executable, "-c", EXPANDABLE],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "TransportError" in done.stdout
    assert "expandable_segments" in done.stdout
