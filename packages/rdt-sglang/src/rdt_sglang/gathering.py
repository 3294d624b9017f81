"""What every rank of a group answers, on all of them, in one round where the answers are short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack
import torch
from torch import distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FIRST_BYTES = 8192
"""Of the first round. A commit's answer has some kilobytes; longer ones take a second round."""

_LENGTH_BYTES = 8


def gather_plain(answer: dict[str, Any], group: ProcessGroup) -> list[dict[str, Any]]:
    """Every rank's answer by rank. All ranks must call it in the same order; blocks until all have.

    A commit waits for it twice, so that it takes one round of the group where torch's
    ``all_gather_object`` takes two.

    Args:
        answer: plain values.
        group: on the CPU.
    """
    raw = msgpack.packb(answer)
    room = FIRST_BYTES - _LENGTH_BYTES
    head = len(raw).to_bytes(_LENGTH_BYTES, "big") + raw[:room]
    heads = _gather_bytes(head, FIRST_BYTES, group)
    lengths = [int.from_bytes(head[:_LENGTH_BYTES], "big") for head in heads]
    left = max(0, max(lengths) - room)
    tails = _gather_bytes(raw[room:], left, group) if left else [b""] * len(heads)
    found = zip(heads, tails, lengths, strict=True)
    return [_unpack((head[_LENGTH_BYTES:] + tail)[:length]) for head, tail, length in found]


def _gather_bytes(sent: bytes, nbytes: int, group: ProcessGroup) -> list[bytes]:
    """``nbytes`` of every rank; what a rank has less is filled up."""
    ours = torch.frombuffer(bytearray(sent.ljust(nbytes, b"\0")), dtype=torch.uint8)
    size = distributed.get_world_size(group)
    received = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(size)]
    distributed.all_gather(received, ours, group=group)
    return [of_rank.numpy().tobytes() for of_rank in received]


def _unpack(raw: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = msgpack.unpackb(raw, strict_map_key=False)
    return answer
