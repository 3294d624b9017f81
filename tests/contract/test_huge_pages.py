"""Huge pages under live memory: the bytes and addresses stay, the pages grow."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

from rdt_core.transports.huge_pages import HUGE_PAGE_BYTES, back_with_huge_pages


def _huge_bytes_at(address: int) -> int:
    """Huge pages of the mapping that holds an address, in bytes."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


def _can_collapse() -> bool:
    policy = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    return version >= (6, 1) and policy.is_file() and "[never]" not in policy.read_text()


def test_memory_moves_onto_huge_pages_and_keeps_its_address_and_bytes() -> None:
    memory = torch.arange(4 * HUGE_PAGE_BYTES, dtype=torch.int32).view(torch.uint8)
    expected, address = memory.clone(), memory.data_ptr()
    back_with_huge_pages([memory[:1000], memory[1000:]])
    assert memory.data_ptr() == address
    assert torch.equal(memory, expected)
    if not _can_collapse():
        pytest.skip("this kernel has no MADV_COLLAPSE (Linux 6.1), or its huge pages are switched off")
    assert _huge_bytes_at(address + HUGE_PAGE_BYTES) >= 2 * HUGE_PAGE_BYTES


def test_memory_that_is_empty_or_not_on_the_cpu_is_left_alone() -> None:
    back_with_huge_pages([torch.empty(0), torch.empty(8, device="meta")])
