"""How every command prints: one JSON object with ``--json``, else tables that fit the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@contextlib.contextmanager
def only_our_output() -> Iterator[None]:
    """Sends what libraries print to standard error, so that standard output holds the command's answer alone.

    NIXL logs to standard output, some of it from native code: the descriptor itself is redirected.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def print_json(values: dict[str, Any]) -> None:
    """One object, to standard output, and nothing else there."""
    typer.echo(json.dumps(values, indent=1))


def print_lines(*lines: str) -> None:
    """Plain lines; rich wraps them at words."""
    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; columns whose name begins with ``#`` hold numbers and are set to the right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        is_number = column.startswith("#")
        table.add_column(column.removeprefix("#"), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(highlight=False, markup=False).print(table)


def show_bytes(nbytes: float) -> str:
    """``68.3 GB``: decimal units, as network and memory makers count."""
    for size, unit in _UNITS:
        if abs(nbytes) >= size:
            return (
                f"{nbytes / size:.3g} {unit}" if abs(nbytes) < 1000 * size else f"{nbytes / size:.0f} {unit}"
            )
    return f"{nbytes:.0f} B"


def show_seconds(seconds: float) -> str:
    """``1.34 s`` or ``35.4 ms``."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
