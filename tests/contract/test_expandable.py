"""CUDA memory in expandable segments is refused at attach. On a CPU only the search for it can be tested."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rdt_core.expandable import find_expandable

_SEGMENTS = (
    {"address": 0x1000, "total_size": 0x1000, "is_expandable": False},
    {"address": 0x2000, "total_size": 0x1000, "is_expandable": True},
)


@pytest.mark.parametrize(
    ("addresses", "found"),
    [([0x1000, 0x1FFF], None), ([0x1000, 0x2000], 1), ([0x2FFF], 0), ([0x3000], None), ([], None)],
)
def test_the_first_address_in_an_expandable_segment_is_found(addresses: list[int], found: int | None) -> None:
    assert find_expandable(addresses, _SEGMENTS) == found


_ATTACH = """
import torch
from rdt_core import WeightPublisher
from rdt_core.client import LocalChannel
from rdt_core.errors import UnsupportedLayoutError
from rdt_megatron import fsdp_shards

local = fsdp_shards(torch.nn.Linear(64, 64).cuda())
try:
    WeightPublisher.attach("policy", local, channel=LocalChannel("policy"))
except UnsupportedLayoutError as error:
    print(error)
"""


@pytest.mark.cuda
def test_a_trainer_with_expandable_segments_is_refused_at_attach_by_parameter() -> None:
    settings = dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True")
    done = subprocess.run(
        [sys.executable, "-c", _ATTACH],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert "cannot export weight of trainer rank 0" in done.stdout
    assert "PYTORCH_CUDA_ALLOC_CONF" in done.stdout
