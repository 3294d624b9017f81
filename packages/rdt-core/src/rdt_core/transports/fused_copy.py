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
    from collections.abc import Iterable

CHUNK_BYTES = 1 << 15
_NUM_THREADS = 512
_SOURCE, _TARGET, _ROW_NBYTES, _NUM_ROWS, _SOURCE_PITCH, _TARGET_PITCH = range(len(RowBlock._fields))

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
        self._table = cut_chunks(blocks).to(device)
        self._kernel = _kernel(device)

    def launch(self, stream: torch.cuda.Stream) -> None:
        """Queue all copies on a stream; returns before they are done.

        Raises:
            CudaDriverError: the device is in error.
        """
        if len(self._table):
            self._kernel.launch(
                stream,
                num_blocks=len(self._table),
                num_threads=_NUM_THREADS,
                address=self._table.data_ptr(),
            )


def cut_chunks(blocks: Iterable[RowBlock]) -> torch.Tensor:
    """The same copies in pieces of at most ``CHUNK_BYTES``, one a block of the kernel.

    Returns:
        int64, on the host, of shape (pieces, 6), with the fields of :class:`RowBlock`.
    """
    flat = array("q", [value for block in blocks for value in block])  # addresses are below 2**63
    if not flat:
        return torch.empty(0, len(RowBlock._fields), dtype=torch.int64)
    table = torch.frombuffer(flat, dtype=torch.int64).view(-1, len(RowBlock._fields))
    is_row = table[:, _NUM_ROWS] == 1
    is_wide = ~is_row & (table[:, _ROW_NBYTES] > CHUNK_BYTES // 2)
    rows = torch.cat([table[is_row], _cut_rows(table[is_wide], torch.ones_like(table[is_wide, 0]))])
    narrow = table[~is_row & ~is_wide]
    return torch.cat([_cut_row(rows), _cut_rows(narrow, CHUNK_BYTES // narrow[:, _ROW_NBYTES].clamp(min=1))])


def _cut_row(rows: torch.Tensor) -> torch.Tensor:
    """Single rows in pieces."""
    pieces, number = _repeat(rows, -(-rows[:, _ROW_NBYTES] // CHUNK_BYTES))
    at = number * CHUNK_BYTES
    pieces[:, _SOURCE] += at
    pieces[:, _TARGET] += at
    pieces[:, _ROW_NBYTES] = (pieces[:, _ROW_NBYTES] - at).clamp(max=CHUNK_BYTES)
    return pieces


def _cut_rows(blocks: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Blocks in pieces of so many rows each."""
    counts = -(-blocks[:, _NUM_ROWS] // most)
    pieces, number = _repeat(blocks, counts)
    most = most.repeat_interleave(counts)
    first = number * most
    pieces[:, _SOURCE] += first * pieces[:, _SOURCE_PITCH]
    pieces[:, _TARGET] += first * pieces[:, _TARGET_PITCH]
    pieces[:, _NUM_ROWS] = torch.minimum(most, pieces[:, _NUM_ROWS] - first)
    return pieces


def _repeat(table: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each entry so many times, and which repetition each is."""
    repeated = table.repeat_interleave(counts, dim=0)
    firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return repeated, torch.arange(len(repeated)) - firsts
