"""A heat map of who reads how much from whom: one HTML file with an SVG inside, no script, no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from rdt_core.cli.output import show_bytes
from rdt_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from rdt_core.plan_summary import PlanSummary

_CELL = 18
_MARGIN = 70
_WIDEST = 1400
_DARK = (8, 64, 129)
_LIGHT = (247, 252, 240)


def write_heat_map(path: Path, title: str, summary: PlanSummary, num_trainers: int) -> None:
    """Write the map: a row an engine rank, a column a trainer rank, the number in a cell's tooltip.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(_page(title, summary, num_trainers), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}. Name a file in a folder that exists."
        ) from error


def _page(title: str, summary: PlanSummary, num_trainers: int) -> str:
    width = max(2.0, min(_CELL, (_WIDEST - _MARGIN) / num_trainers))
    most = max((max(row.by_trainer.values(), default=0) for row in summary.ranks), default=0) or 1
    cells = "".join(
        _cell(
            trainer,
            line,
            width,
            nbytes / most,
            f"engine rank {row.rank} reads {show_bytes(nbytes)} from trainer {trainer}",
        )
        for line, row in enumerate(summary.ranks)
        for trainer, nbytes in sorted(row.by_trainer.items())
    )
    labels = "".join(
        f'<text x="{_MARGIN - 8}" y="{_MARGIN + line * _CELL + 13}" text-anchor="end">{row.rank}</text>'
        for line, row in enumerate(summary.ranks)
    )
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 30) if s * width >= 2 * _CELL)
    labels += "".join(
        f'<text x="{_MARGIN + (trainer + 0.5) * width:.1f}" y="{_MARGIN - 8}" text-anchor="middle">'
        f"{trainer}</text>"
        for trainer in range(0, num_trainers, step)
    )
    size = (_MARGIN + num_trainers * width + 20, _MARGIN + len(summary.ranks) * _CELL + 20)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        "<style>body{font:14px system-ui,sans-serif;margin:24px}text{font-size:11px;fill:#444}</style>"
        f"<h1>{escape(title)}</h1><p>Rows: engine ranks. Columns: trainer ranks. "
        f"Darkest: {show_bytes(most)}. Point at a cell for its number.</p>"
        f'<svg role="img" width="{size[0]:.0f}" height="{size[1]:.0f}" xmlns="http://www.w3.org/2000/svg">'
        f"<title>Bytes read by engine rank and trainer rank</title>{labels}{cells}</svg></html>\n"
    )


def _cell(trainer: int, line: int, width: float, share: float, tip: str) -> str:
    color = ",".join(str(round(a + (b - a) * share)) for a, b in zip(_LIGHT, _DARK, strict=True))
    return (
        f'<rect x="{_MARGIN + trainer * width:.1f}" y="{_MARGIN + line * _CELL}" width="{width:.1f}" '
        f'height="{_CELL - 1}" fill="rgb({color})" stroke="#ddd" stroke-width="0.5">'
        f"<title>{tip}</title></rect>"
    )
