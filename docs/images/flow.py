"""Draws flow.svg, the picture in the README: `python docs/images/flow.py`."""

from __future__ import annotations

import html
from pathlib import Path

WIDTH, HEIGHT = 980, 430
INK, SOFT, TRAINER, ENGINE, CONTROL = "#1f2933", "#6b7785", "#e6f0fa", "#e9f6ec", "#fff4dc"
_shapes: list[str] = []


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str, bold: bool = True) -> None:
    """A rounded box; the first line is its title."""
    _shapes.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{INK}"/>'
    )
    for row, line in enumerate(lines):
        weight = "600" if bold and row == 0 else "400"
        text(x + width // 2, y + 22 + 18 * row, line, weight=weight, color=INK if row == 0 else SOFT)


def text(x: int, y: int, line: str, *, weight: str = "400", color: str = INK, anchor: str = "middle") -> None:
    """One line of text."""
    _shapes.append(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="{color}">'
        f"{html.escape(line)}</text>"
    )


def arrow(points: str, color: str, *, width: float = 1.6, dashed: bool = False) -> None:
    """A polyline with a head at its end."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    marker = "bytes" if color != SOFT else "meta"
    _shapes.append(
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}"{dash} '
        f'marker-end="url(#{marker})"/>'
    )


def draw() -> str:
    """The whole picture."""
    blue = "#1b6ec2"
    for rank, y in ((0, 60), (1, 190)):
        box(
            30,
            y,
            250,
            100,
            TRAINER,
            f"trainer rank {rank}",
            "FSDP2 shard: live parameters",
            "written by the optimizer",
        )
        box(
            470,
            y,
            210,
            100,
            "#ffffff",
            "landing memory",
            f"of engine rank {rank}",
            "one-sided reads, any time",
        )
        box(760, y, 190, 100, ENGINE, f"model, rank {rank}", "qkv, gate_up, ...", "serving version v")
        arrow(f"680,{y + 50} 756,{y + 50}", "#2e8540", width=3)
        text(718, y + 40, "commit", color="#2e8540")
    for start, stop in ((100, 100), (110, 222), (230, 118), (240, 240)):
        arrow(f"280,{start} 466,{stop}", blue, width=2.4)
    text(375, 82, "prepare: NIXL reads", color=blue)
    box(
        350,
        330,
        280,
        78,
        CONTROL,
        "coordinator (one Ray actor)",
        "manifests, versions, outcomes;",
        "no weight byte passes here",
    )
    arrow("155,290 155,370 346,370", SOFT, dashed=True)
    text(160, 386, "attach, publish(v)", color=SOFT, anchor="start")
    arrow("575,290 575,326", SOFT, dashed=True)
    text(584, 312, "plan, prepared(v)", color=SOFT, anchor="start")
    box(700, 336, 250, 66, "#ffffff", "driver", "sync.update(version=v)")
    arrow("700,370 634,370", SOFT, dashed=True)
    arrow("855,336 855,294", SOFT, dashed=True)
    text(862, 318, "HTTP /rdt/*", color=SOFT, anchor="start")
    text(155, 40, "training processes", weight="600")
    text(700, 40, "inside the inference engine's workers", weight="600")
    _shapes.append(
        '<rect x="450" y="48" width="516" height="254" rx="12" fill="none" '
        f'stroke="{SOFT}" stroke-dasharray="3 4"/>'
    )
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="5.5" markerHeight="5.5" '
        f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{fill}"/></marker>'
        for name, fill in (("bytes", "#1f2933"), ("meta", SOFT))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13"><defs>{heads}</defs>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>{"".join(_shapes)}</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
