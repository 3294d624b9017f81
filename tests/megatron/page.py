"""The tables about Megatron-core in docs/trainers.md: ``python -m tests.megatron.page`` writes them anew.

They are made of the configurations that the tests run and of the switches that the exporter refuses; a unit
test compares.
"""

from __future__ import annotations

from pathlib import Path

from rdt_megatron.model_config import REFUSALS
from tests.megatron.configurations import CONFIGURATIONS

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
BEGIN, END = "<!-- begin: written by tests/megatron/page.py -->", "<!-- end -->"


def make_tables() -> str:
    """Both tables, as Markdown."""
    tested = [
        f"| {name} | {c.family} | {'direct' if c.is_direct else 'direct; experts pack'} | {c.proof} |"
        for name, c in CONFIGURATIONS.items()
    ]
    refused = [
        f"| `{r.switch}` | refused: {r.effect}. {r.remedy.replace(r.switch, f'`{r.switch}`', 1)} |"
        for r in REFUSALS
    ]
    return "\n".join(
        [
            "| configuration | model | exported | compared with transformers |",
            "|---|---|---|---|",
            *tested,
            "",
            "| Megatron's switch | exported |",
            "|---|---|",
            *refused,
        ]
    )


def put_into(page: str) -> str:
    """The page with the tables between its marks made anew."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{make_tables()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(put_into(PAGE.read_text()))
