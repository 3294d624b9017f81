"""The door through which SGLang finds the platform."""

from __future__ import annotations


def activate() -> str:
    """Name the platform's class, which SGLang imports."""
    return "sglang_cpu_platform.platform.PlainCpuPlatform"
