"""A chaos run's report in words: a table for a person, and one line for a log that shows little else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NOT_SHOWN = ("reasons", "schedule", "held_before", "held_after")
_REASON_CHARS = 300


def table(report: Mapping[str, Any]) -> str:
    """The report for a person."""
    rows = {name: value for name, value in report.items() if name not in _NOT_SHOWN}
    lines = [f"{name:<28} {_short(value)}" for name, value in rows.items()]
    return "\n".join(["", *lines, ""])


def failure_line(reasons: Sequence[str], again: str) -> str:
    """Why a run failed and how to have it again, on one line.

    Args:
        reasons: each of any length.
        again: the arguments that play it again.
    """
    said = "; ".join(" ".join(reason.split())[:_REASON_CHARS] for reason in reasons)
    return f"FAILED tests.chaos - {said}; again with {again}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    if isinstance(value, list):
        return "0" if not value else f"{len(value)}: " + "; ".join(map(str, value[:3]))
    return str(value)
