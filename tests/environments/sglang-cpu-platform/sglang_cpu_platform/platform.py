"""A CPU without kernels of its own: SGLang's layers take their plain torch path there."""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Out of tree, so that nothing of SGLang looks for the kernels of its built-in CPU platform."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        """Attention in plain torch."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """The suffix of the methods that layers run: ``forward_native``."""
        return "native"


if not torch.cuda.is_available():
    # srt/ray/scheduler_actor.py calls it on every platform.
    torch.cuda.set_device = lambda device: None
