"""Stands for triton: importable, and without kernels."""

from __future__ import annotations

from typing import Any

from absent_package import stand_in


class Config:
    """A kernel's tuning choice; SGLang makes lists of them when it is imported."""

    def __init__(self, kwargs: dict[str, Any] | None = None, **more: Any) -> None:
        self.kwargs = kwargs or {}
        self.__dict__.update(more)


stand_in(
    "triton",
    Config=Config,
    cdiv=lambda a, b: -(a // -b),
    next_power_of_2=lambda n: 1 << (n - 1).bit_length() if n > 0 else 1,
)
