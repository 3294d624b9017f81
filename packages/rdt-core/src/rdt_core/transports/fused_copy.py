"""Any number of byte ranges copied on a GPU by one kernel launch.

``torch._foreach_copy_`` launches a kernel for every hundred tensors and builds their list anew each time.
Here the list is a table in device memory, made once; a range may begin at any byte, so that a column block
is as many ranges as it has rows, and nothing is packed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from rdt_core.transports.cuda_driver import Kernel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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

// Block b copies the chunk of row b: source address, target address, bytes.
extern "C" __global__ void copy_chunks(const unsigned long long* table) {
    const unsigned long long* row = table + 3ull * blockIdx.x;
    const char* from = reinterpret_cast<const char*>(row[0]);
    char* to = reinterpret_cast<char*>(row[1]);
    unsigned long long left = row[2];

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
        ranges: (source address, target address, bytes), readable and writable from ``device``.
        device: that copies.

    Raises:
        CudaDriverError, OSError: the kernel cannot be compiled or loaded.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, int]], device: torch.device) -> None:
        chunks = cut_chunks(ranges)
        self._num_chunks = len(chunks)
        # Addresses are below 2**63, so that int64 holds them.
        self._table = torch.tensor(chunks, dtype=torch.int64).reshape(-1, 3).to(device)
        self._kernel = _kernel(device)

    def launch(self, stream: torch.cuda.Stream) -> None:
        """Queue all copies on a stream; returns before they are done.

        Raises:
            CudaDriverError: the device is in error.
        """
        if self._num_chunks:
            self._kernel.launch(
                stream,
                num_blocks=self._num_chunks,
                num_threads=_NUM_THREADS,
                address=self._table.data_ptr(),
            )


def cut_chunks(ranges: Iterable[tuple[int, int, int]]) -> Sequence[tuple[int, int, int]]:
    """The same copies in pieces of at most ``CHUNK_BYTES``, one a block of the kernel."""
    return [
        (source + at, target + at, min(CHUNK_BYTES, nbytes - at))
        for source, target, nbytes in ranges
        for at in range(0, nbytes, CHUNK_BYTES)
    ]
