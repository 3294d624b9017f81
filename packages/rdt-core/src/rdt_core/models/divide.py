"""Even division with an error that names what does not divide."""

from __future__ import annotations

from rdt_core.errors import ConfigError


def divide(size: int, parts: int, what: str, option: str) -> int:
    """``size // parts``.

    Raises:
        ConfigError: it does not divide.
    """
    if parts < 1 or size % parts:
        raise ConfigError(f"{what} ({size}) does not divide by {option}={parts}. Choose a divisor of {size}.")
    return size // parts


def block(size: int, parts: int, index: int, what: str, option: str) -> tuple[int, int]:
    """``[start, stop)`` of one of ``parts`` even blocks.

    Raises:
        ConfigError: it does not divide.
    """
    step = divide(size, parts, what, option)
    return index * step, (index + 1) * step


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """``[start, stop)`` of one of ``parts`` blocks as ``torch.chunk`` cuts: equal, then short, then empty."""
    step = -(-size // parts)
    return min(index * step, size), min((index + 1) * step, size)


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
