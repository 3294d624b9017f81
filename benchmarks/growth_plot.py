"""Draws what ``growth.py`` measured: two panels on logarithmic axes, as an SVG of lines and words.

python benchmarks/growth_plot.py benchmarks/results/growth-h200.json docs/images/growth.svg
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN = 430, 330, 56
LINES = (
    ("ours", "end_to_end", "#0b5394", "", "publish to committed, with Ray's call"),
    ("ours", "commit", "#b45f06", "6 3", "of which the commit: generation stands"),
    ("copy_in_process", "end_to_end", "#333", "2 3", "limit: one copy in one process"),
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: which points, along which of their numbers.

    Args:
        left: of the panel, in pixels.
        label: of its horizontal axis.
        spans: of both axes, first and last value.
        ticks: of both axes.
    """

    left: float
    label: str
    spans: tuple[tuple[float, float], tuple[float, float]]
    ticks: tuple[tuple[float, ...], tuple[float, ...]]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is, in pixels."""
        along, up = (_part(value, span) for value, span in zip((x, y), self.spans, strict=True))
        return (
            self.left + MARGIN + along * (WIDTH - 1.5 * MARGIN),
            HEIGHT - MARGIN - up * (HEIGHT - 1.7 * MARGIN),
        )

    def axes(self) -> str:
        """Lines and labels of both axes."""
        (x_first, x_last), (y_first, y_last) = self.spans
        parts = []
        for x in self.ticks[0]:
            (column, bottom), (_, top) = self.place(x, y_first), self.place(x, y_last)
            parts.append(_line(column, bottom, column, top, "#ddd"))
            parts.append(_text(column, bottom + 16, f"{x:,g}", "middle"))
        for y in self.ticks[1]:
            (left, row), (right, _) = self.place(x_first, y), self.place(x_last, y)
            parts.append(_line(left, row, right, row, "#ddd"))
            parts.append(_text(left - 6, row + 4, f"{y:g}", "end"))
        parts.append(_text(self.left + WIDTH / 2, HEIGHT - 14, self.label, "middle"))
        parts.append(_text(self.left + MARGIN, 24, "ms", "end"))
        return "".join(parts)

    def curve(self, points: list[tuple[float, float]], color: str, dashes: str) -> str:
        """One line with its points."""
        placed = [self.place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in placed)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dashed}/>{dots}'


EVEN_TENSORS = 310
EVEN_CASE = "qwen3-0.6b"
"""Has the bytes that the cases of many tensors have."""
BY_BYTES = Panel(0, "GB, in 310 tensors", ((0.08, 30), (0.05, 50)), ((0.1, 0.3, 1, 3, 10, 24), (0.1, 1, 10)))
BY_TENSORS = Panel(
    WIDTH, "tensors, 1.1 to 1.2 GB in all", ((250, 45_000), (0.5, 50)), ((310, 3_000, 37_000), (1, 10))
)


def draw(result: dict[str, Any]) -> str:
    """The whole picture."""
    plain = [p for p in result["points"] if p["name"] == p["case"]]
    by_bytes = [p for p in plain if p["num_tensors"] == EVEN_TENSORS]
    by_tensors = [p for p in plain if p["name"].endswith("-tensors") or p["name"] == EVEN_CASE]
    parts = []
    for panel, points, key, unit in (
        (BY_BYTES, by_bytes, "nbytes", 1e9),
        (BY_TENSORS, by_tensors, "num_tensors", 1),
    ):
        parts.append(panel.axes())
        for path, phase, color, dashes, _ in LINES:
            values = sorted((p[key] / unit, _median(p, path, phase)) for p in points)
            parts.append(panel.curve(values, color, dashes))
    for row, (_, _, color, dashes, words) in enumerate(LINES):
        y = 34 + 16 * row
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(f'<path d="M70 {y}h26" stroke="{color}" stroke-width="1.6"{dashed}/>')
        parts.append(_text(102, y + 4, words, "start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{HEIGHT}" role="img">'
        "<title>Milliseconds of a sync against bytes and against tensors</title>"
        "<style>text{font:12px sans-serif;fill:#333}</style>"
        f'<rect width="{2 * WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _part(value: float, span: tuple[float, float]) -> float:
    return math.log(value / span[0]) / math.log(span[1] / span[0])


def _median(point: dict[str, Any], path: str, phase: str) -> float:
    (row,) = [row for row in point["results"] if (row["path"], row["phase"]) == (path, phase)]
    return float(row["median_ms"])


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped}</text>'


def main() -> None:
    """Draw one result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("svg", type=Path)
    args = parser.parse_args()
    args.svg.write_text(draw(json.loads(args.result.read_text())))


if __name__ == "__main__":
    main()
