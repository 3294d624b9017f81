"""docs/trainers.md says what the tests of the exporters run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import page as shardings_page
from tests.integration.shardings import REFUSED, SHARDINGS
from tests.megatron.page import PAGE, put_into

_TESTS = Path(__file__).parents[1] / "integration"
_TEST_FILES = ("test_fsdp_exporter.py", "test_lora_exporters.py")
_CASES = [case for row in SHARDINGS.values() for case in row.cases]


def test_the_tables_about_megatron_are_those_of_the_tested_configurations() -> None:
    page = PAGE.read_text()
    assert put_into(page) == page, "run python -m tests.megatron.page"


def test_the_table_about_pytorchs_shardings_is_that_of_the_tested_configurations() -> None:
    page = PAGE.read_text()
    assert shardings_page.put_into(page) == page, "run python -m tests.integration.page"


@pytest.mark.parametrize("case", sorted({*_CASES, *(case for cases in REFUSED.values() for case in cases)}))
def test_every_case_that_the_table_rests_on_is_run_by_a_test(case: str) -> None:
    tests = "".join(
        (_TESTS / name).read_text() for name in ("test_fsdp_exporter.py", "test_lora_exporters.py")
    )
    functions = "".join(file.read_text() for file in _TESTS.glob("*_cases.py"))
    assert f'"{case}"' in tests
    assert f"def {case.rpartition('.')[2]}(" in functions
