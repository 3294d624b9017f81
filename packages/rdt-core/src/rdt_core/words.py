"""What a group's members and its coordinator say to each other, beside plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdt_core.errors import RdtError


@dataclass(frozen=True, slots=True)
class TrainerTask:
    """Something a trainer rank's service thread is asked to do.

    Args:
        number: identifies the answer.
        kind: ``"probe"``, ``"export"``, ``"digest_reads"`` and ``"drop"``, all of which name a reader
            (:mod:`rdt_core.exports`), ``"digest"`` (payload: dtype by tensor), or ``"trace"`` (payload: the
            version whose publish belongs to the trace); nobody waits for the answer to the last.
        payload: plain values.
        traceparent: of whoever asks, empty when there is no trace.
    """

    number: int
    kind: str
    payload: Any
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a task, or of one engine rank's prepare: a value or an error."""

    value: Any = None
    error: RdtError | None = None


@dataclass(frozen=True, slots=True)
class LastWords:
    """What a trainer rank had said to a coordinator that is gone.

    Args:
        session: of the group then; empty when the rank is new.
        version: that it had published last, 0 if none.
        is_writing: whether it had taken that version back.
    """

    session: str = ""
    version: int = 0
    is_writing: bool = True


NOTHING_SAID = LastWords()
