"""When the ranks of an engine count as holding one version."""

from __future__ import annotations

from typing import Any

import pytest

from rdt_core.wholeness import are_whole, find_torn


def state(version: int, session: str = "first", *, is_torn: bool = False) -> dict[str, Any]:
    return {"version": version, "session": session, "is_torn": is_torn}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([state(7)], True),
        ([state(7), state(7)], True),
        ([state(0, ""), state(0, "")], True),
        ([state(7), state(6)], False),
        ([state(7), state(7, "second")], False),
        ([state(0, ""), state(7)], False),
        ([state(7), state(7, is_torn=True)], False),
        ([], False),
    ],
)
def test_ranks_are_whole_with_one_version_of_one_session(
    states: list[dict[str, Any]], *, expected: bool
) -> None:
    assert are_whole(states) is expected
    found = find_torn("an engine", [{"ok": True, "result": one} for one in states])
    assert (found is None) is expected


def test_a_rank_that_cannot_say_what_it_holds_may_hold_anything() -> None:
    answers = [{"ok": True, "result": state(7)}, {"ok": False, "error": {}}]
    found = find_torn("an engine", answers)
    assert found is not None
    assert "an engine" in str(found)
