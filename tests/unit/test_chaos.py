"""The judge and the schedule of the chaos runs: they find what they look for, and a seed says all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.chaos.plan import from_plain, plan_faults, to_plain
from tests.chaos.verdict import Answer, judge
from tests.chaos.words import failure_line

if TYPE_CHECKING:
    from collections.abc import Sequence


def says(version: int, tokens: Sequence[int]) -> list[bool]:
    """A model that at every version says its version, again and again."""
    return [token == version for token in tokens]


def answer(tokens: Sequence[int], versions: Sequence[int], *, at_s: float = 1.0, engine: str = "a") -> Answer:
    return Answer(
        engine=engine, started_s=at_s, ended_s=at_s + 0.5, tokens=tuple(tokens), versions=tuple(versions)
    )


def test_answers_of_one_version_each_and_one_that_spans_a_commit_are_good() -> None:
    good = [answer([1, 1], [1, 1]), answer([1, 2], [1, 2], at_s=2.0), answer([2, 2], [2, 2], at_s=3.0)]
    verdict = judge(good, says)
    assert (verdict.mixed, verdict.regressed) == ((), ())


def test_a_token_of_another_version_than_its_label_is_found() -> None:
    wrong = answer([2, 1], [2, 2])
    assert judge([wrong], says).mixed == (wrong,)


def test_an_answer_without_labels_counts_as_mixed() -> None:
    bare = answer([2, 2], [])
    assert judge([bare], says).mixed == (bare,)


def test_a_version_that_goes_back_is_found_between_answers_and_within_one() -> None:
    later, back = answer([2], [2]), answer([1], [1], at_s=2.0)
    within = answer([2, 1], [2, 1], engine="b")
    assert judge([back, later, within], says).regressed == (within, back)


def test_answers_that_ran_at_once_and_engines_that_are_others_do_not_regress() -> None:
    at_once = [answer([2], [2], at_s=1.0), answer([1], [1], at_s=1.1)]
    others = [answer([2], [2], at_s=3.0, engine="b"), answer([1], [1], at_s=4.0, engine="c")]
    assert judge([*at_once, *others], says).regressed == ()


def test_a_seed_gives_the_same_faults_again_and_a_report_keeps_them() -> None:
    faults = plan_faults(7, 600.0)
    assert plan_faults(7, 600.0) == faults != plan_faults(8, 600.0)
    assert from_plain(to_plain(faults)) == faults
    assert len({fault.kind for fault in faults}) == 8
    assert all(0 < fault.at_s < 585 for fault in faults)


def test_a_failed_run_says_on_one_line_why_and_how_to_have_it_again() -> None:
    line = failure_line(["hangs: 1, the first: it\nstood", "grown: 2, the first: " + "x" * 1000], "--seed 7")
    assert line.startswith("FAILED tests.chaos - hangs: 1, the first: it stood; grown: 2, the first: xxx")
    assert line.endswith("; again with --seed 7")
    assert "\n" not in line
    assert len(line) < 500
