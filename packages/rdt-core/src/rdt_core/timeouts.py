"""How long a message from elsewhere may ask somebody to wait."""

from __future__ import annotations

from rdt_core.errors import WireFormatError

MAX_TIMEOUT_S = 86_400.0
"""A day."""


def check_timeout(timeout_s: object) -> float:
    """A number of seconds that can be waited for; 0 for less.

    A NaN would end the event loop that waits for it, and infinity a deadline.

    Raises:
        WireFormatError: it is not a number, or more than a day.
    """
    if (
        isinstance(timeout_s, bool)
        or not isinstance(timeout_s, (int, float))
        or not timeout_s <= MAX_TIMEOUT_S
    ):
        raise WireFormatError(
            "request", f"timeout_s must be seconds, a day at most, got {str(timeout_s)[:50]}"
        )
    return max(0.0, float(timeout_s))
