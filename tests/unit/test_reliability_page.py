"""docs/reliability.md shows the tables that the code follows and that the fault tests run.

``python -m tests.unit.test_reliability_page`` writes them into the page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core.lifecycle import MODEL_MOVES, RANK_MOVES, SYNC_MOVES
from tests.faults import cells, results
from tests.faults.engines.cells import ENGINES, cells_of

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"


def draw(moves: Mapping[tuple[Any, Any], Any]) -> str:
    """One row a state, one column an event."""
    states = list(dict.fromkeys(state for state, _ in moves))
    events = list(dict.fromkeys(event for _, event in moves))
    lines = ["| in | " + " | ".join(events) + " |", "|---" * (len(events) + 1) + "|"]
    lines += [
        f"| **{state}** | " + " | ".join(moves.get((state, event), "") for event in events) + " |"
        for state in states
    ]
    return "\n".join(lines)


ROWS = results.read()["rows"]
TABLES = {
    "rank": draw(RANK_MOVES),
    "model": draw(MODEL_MOVES),
    "driver": draw(SYNC_MOVES),
    "faults": cells.table((*cells.CELLS, *cells.SURROUNDINGS), ROWS),
    "real engines": cells.table([cell for engine in ENGINES for cell in cells_of(engine)], ROWS),
    "impossible": cells.list_impossible(),
    "runs": results.table(results.read()["runs"]),
}


def block_of(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {name} -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_the_page_shows_the_table_that_the_code_follows(name: str) -> None:
    (shown,) = block_of(name).findall(PAGE.read_text(encoding="utf-8"))
    assert shown == TABLES[name], "run python -m tests.unit.test_reliability_page"


def test_every_test_that_the_page_names_exists() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if f"def {name}(" not in sources] == []


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = block_of(name).sub(table.replace("\\", r"\\"), text)
    PAGE.write_text(text, encoding="utf-8")
