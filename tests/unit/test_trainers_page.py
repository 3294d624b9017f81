"""docs/trainers.md says what the tests of the exporters run."""

from __future__ import annotations

from tests.megatron.page import PAGE, put_into


def test_the_tables_about_megatron_are_those_of_the_tested_configurations() -> None:
    page = PAGE.read_text()
    assert put_into(page) == page, "run python -m tests.megatron.page"
