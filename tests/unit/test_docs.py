"""The documentation against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rdt_core import errors
from rdt_core.gateway import errors as gateway_errors

DOCS = Path(__file__).parents[2] / "docs"
CLASSES = sorted(
    name
    for name, found in {**vars(errors), **vars(gateway_errors)}.items()
    if isinstance(found, type) and issubclass(found, Exception)
)


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_has_an_entry_in_troubleshooting(name: str) -> None:
    entries = re.findall(r"^### `(\w+)`\n(.+)", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert dict(entries).get(name), f"add an entry for {name} to docs/troubleshooting.md"


def test_troubleshooting_has_no_entry_for_an_error_that_is_gone() -> None:
    entries = re.findall(r"^### `(\w+)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert set(entries) == set(CLASSES)
    assert len(entries) == len(CLASSES)


def test_the_quick_start_shows_the_example_as_it_is() -> None:
    code = (DOCS.parent / "examples" / "quick_start" / "train.py").read_text()
    _, _, body = code.partition('"""\n\nimport')
    assert f"```python\nimport{body}```" in (DOCS / "quick-start.md").read_text()


@pytest.mark.parametrize(
    "page", sorted([DOCS.parent / "README.md", *DOCS.rglob("*.md")]), ids=lambda p: p.name
)
def test_no_page_holds_what_a_merge_left_open(page: Path) -> None:
    assert not re.findall(r"^(?:<<<<<<<|=======|>>>>>>>)(?: |$)", page.read_text(), re.MULTILINE)
