"""Reads in pieces with rests between them, for engines whose model should feel little of them."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rdt_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

WITHOUT_REST = 1.0
"""The share of a read that is done as fast as its links go."""

_PIECE_NBYTES = 64 * 2**20
_MAX_PIECES = 64
_MAX_REST_S = 0.25


def check_read_share(share: object) -> float:
    """A share as a user gave it.

    Raises:
        ConfigError: not a number above 0, up to 1.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError(
            f"read_share must be a share of the time, more than 0 and 1 at most, got {share!r}. Leave it out "
            "to read as fast as the links go."
        )
    return float(share)


def piece_nbytes(total_nbytes: int) -> int:
    """Size of the pieces, in bytes, into which an engine rank cuts what it reads a version.

    A piece is short beside a step of a model, and there are not many of them: each is an export of its own.
    """
    return max(_PIECE_NBYTES, -(-total_nbytes // _MAX_PIECES))


class Pace:
    """How one read alternates between moving bytes and resting. Made for every read, used by one thread.

    Args:
        share: of the time in which bytes move; the rests after a piece make up for what is missing.
    """

    def __init__(self, share: float) -> None:
        self._rest_factor = 1.0 / share - 1.0
        self._owed_s = 0.0

    def rest(self, left_s: float) -> None:
        """Sleep for what the last piece asks for, a quarter of a second and ``left_s`` seconds at most.

        A piece that takes longer than that quarter comes over a slow link, and slow links disturb no model.
        """
        rest_s, self._owed_s = min(self._owed_s, _MAX_REST_S, left_s), 0.0
        if rest_s > 0:
            time.sleep(rest_s)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around the move of one piece."""
        began = time.perf_counter()
        yield
        self._owed_s = self._rest_factor * (time.perf_counter() - began)
