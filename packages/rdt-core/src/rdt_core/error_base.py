"""The base of every error that this project raises on purpose."""

from __future__ import annotations


class RdtError(Exception):
    """Base of every error raised on purpose by this project.

    Args:
        message: what happened, what was expected, what to do next.
        fields: the subclass's arguments, to rebuild it in another process: plain values and sequences only.
    """

    failed_rank = -1
    """Which rank of an engine raised this, where an engine's answer told; -1 otherwise. Not on the wire."""

    def __init__(self, message: str, fields: tuple[object, ...] = ()) -> None:
        self.message = message
        self.fields: tuple[object, ...] = fields or (message,)
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RdtError], tuple[object, ...]]:
        return (type(self), self.fields)
