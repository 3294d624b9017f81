"""Any number of byte ranges copied on a GPU by one kernel launch.

``torch._foreach_copy_`` launches a kernel for every hundred tensors and builds their list anew each time.
Here the list is a table in device memory, made once. A range may begin at any byte; a column block is one
entry for all of its rows.
"""

from __future__ import annotations

import functools
from array import array
from typing import TYPE_CHECKING

import torch

from rdt_core.row_blocks import RowBlock
from rdt_core.transports.cuda_driver import Kernel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK_BYTES = 1 << 15
_NUM_THREADS = 512

SOURCE = r"""
template <typename Word>
__device__ void copy_words(char* to, const char* from, unsigned long long nbytes) {
    const Word* source = reinterpret_cast<const Word*>(from);
    Word* target = reinterpret_cast<Word*>(to);
    const unsigned int count = nbytes / sizeof(Word), step = blockDim.x;
    unsigned int i = threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {  // four loads in flight before the first store
        const Word a = source[i], b = source[i + step], c = source[i + 2 * step], d = source[i + 3 * step];
        target[i] = a, target[i + step] = b, target[i + 2 * step] = c, target[i + 3 * step] = d;
    }
    for (; i < count; i += step) target[i] = source[i];
}

template <typename Word>
__device__ void copy_rows(char* to, const char* from, unsigned int row_nbytes, unsigned int num_rows,
                          unsigned long long from_pitch, unsigned long long to_pitch) {
    const unsigned int width = row_nbytes / sizeof(Word), count = width * num_rows, step = blockDim.x;
    for (unsigned int first = threadIdx.x; first < count; first += 4 * step) {
        Word words[4];
        char* places[4];
        #pragma unroll
        for (unsigned int k = 0; k < 4; k++) {  // four loads in flight before the first store
            const unsigned int i = first + k * step, row = i / width;
            const unsigned long long column = (i - row * width) * sizeof(Word);
            places[k] = to + row * to_pitch + column;
            if (i < count) words[k] = *reinterpret_cast<const Word*>(from + row * from_pitch + column);
        }
        #pragma unroll
        for (unsigned int k = 0; k < 4; k++)
            if (first + k * step < count) *reinterpret_cast<Word*>(places[k]) = words[k];
    }
}

// Block b copies entry b: source and target address, bytes of a row, rows, and their pitches.
extern "C" __global__ void copy_chunks(const unsigned long long* table) {
    const unsigned long long* row = table + 6ull * blockIdx.x;
    const char* from = reinterpret_cast<const char*>(row[0]);
    char* to = reinterpret_cast<char*>(row[1]);
    unsigned long long left = row[2];

    if (row[3] > 1) {
        const unsigned int rows = row[3], nbytes = row[2];
        const unsigned long long all = row[0] | row[1] | row[2] | row[4] | row[5];
        if (!(all & 15)) copy_rows<uint4>(to, from, nbytes, rows, row[4], row[5]);
        else if (!(all & 7)) copy_rows<uint2>(to, from, nbytes, rows, row[4], row[5]);
        else if (!(all & 3)) copy_rows<unsigned int>(to, from, nbytes, rows, row[4], row[5]);
        else if (!(all & 1)) copy_rows<unsigned short>(to, from, nbytes, rows, row[4], row[5]);
        else copy_rows<unsigned char>(to, from, nbytes, rows, row[4], row[5]);
        return;
    }

    // The widest word on whose grid both sides can come to lie together.
    const unsigned long long apart = row[0] ^ row[1];
    const unsigned int word = apart & 1 ? 1 : apart & 2 ? 2 : apart & 4 ? 4 : apart & 8 ? 8 : 16;
    unsigned long long head = (0ull - row[0]) & (word - 1);
    if (head > left) head = left;
    if (threadIdx.x < head) to[threadIdx.x] = from[threadIdx.x];
    from += head, to += head, left -= head;

    const unsigned long long body = left - left % word, tail = left - body;
    switch (word) {
        case 16: copy_words<uint4>(to, from, body); break;
        case 8: copy_words<uint2>(to, from, body); break;
        case 4: copy_words<unsigned int>(to, from, body); break;
        case 2: copy_words<unsigned short>(to, from, body); break;
        default: copy_words<unsigned char>(to, from, body);
    }
    if (threadIdx.x < tail) to[body + threadIdx.x] = from[body + threadIdx.x];
}
"""


@functools.cache
def _kernel(device: torch.device) -> Kernel:
    return Kernel(SOURCE, "copy_chunks", device)


class FusedCopy:
    """Copies that are launched together, again and again.

    Whoever makes it keeps the memory alive.

    Args:
        blocks: rows by their addresses, readable and writable from ``device``.
        device: that copies.

    Raises:
        CudaDriverError, OSError: the kernel cannot be compiled or loaded.
    """

    def __init__(self, blocks: Iterable[RowBlock], device: torch.device) -> None:
        # Addresses are below 2**63, so that int64 holds them.
        table = array("q", [value for chunk in cut_chunks(blocks) for value in chunk])
        self._num_chunks = len(table) // len(RowBlock._fields)
        self._table = torch.frombuffer(table, dtype=torch.int64).to(device) if table else None
        self._kernel = _kernel(device)

    def launch(self, stream: torch.cuda.Stream) -> None:
        """Queue all copies on a stream; returns before they are done.

        Raises:
            CudaDriverError: the device is in error.
        """
        if self._table is not None:
            self._kernel.launch(
                stream,
                num_blocks=self._num_chunks,
                num_threads=_NUM_THREADS,
                address=self._table.data_ptr(),
            )


def cut_chunks(blocks: Iterable[RowBlock]) -> Iterator[RowBlock]:
    """The same copies in pieces of at most ``CHUNK_BYTES``, one a block of the kernel."""
    for block in blocks:
        if block.num_rows == 1:
            yield from _cut_row(block.source, block.target, block.row_nbytes)
        elif block.row_nbytes > CHUNK_BYTES // 2:
            for row in range(block.num_rows):
                source, target = (
                    block.source + row * block.source_pitch,
                    block.target + row * block.target_pitch,
                )
                yield from _cut_row(source, target, block.row_nbytes)
        else:
            yield from _cut_rows(block)


def _cut_row(source: int, target: int, nbytes: int) -> Iterator[RowBlock]:
    for at in range(0, nbytes, CHUNK_BYTES):
        yield RowBlock(source + at, target + at, min(CHUNK_BYTES, nbytes - at))


def _cut_rows(block: RowBlock) -> Iterator[RowBlock]:
    most = CHUNK_BYTES // max(block.row_nbytes, 1)
    for row in range(0, block.num_rows, most):
        yield block._replace(
            source=block.source + row * block.source_pitch,
            target=block.target + row * block.target_pitch,
            num_rows=min(most, block.num_rows - row),
        )
