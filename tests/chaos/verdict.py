"""What the answers of a chaos run prove: pure, so that a test can show that it finds what it looks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer of one engine.

    Args:
        engine: its life: another one after every restart.
        started_s: when it was asked, on one clock for all answers.
        ended_s: when it was there.
        tokens: after the prompt.
        versions: one a token, as the engine labelled them.
    """

    engine: str
    started_s: float
    ended_s: float
    tokens: tuple[int, ...]
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with the answers; every list is empty in a good run.

    Args:
        mixed: answers with a token that the version of its label does not say.
        regressed: answers with a version before one that its engine had served.
    """

    mixed: tuple[Answer, ...]
    regressed: tuple[Answer, ...]


def judge(answers: Sequence[Answer], allows: Callable[[int, tuple[int, ...]], Sequence[bool]]) -> Verdict:
    """Compare every token with what the model of its version says after the tokens before it.

    Args:
        answers: of all engines, in any order.
        allows: for a version and tokens, whether its model continues with each of them.
    """
    return Verdict(
        mixed=tuple(answer for answer in answers if not _is_explained(answer, allows)),
        regressed=tuple(_find_regressed(answers)),
    )


def _is_explained(answer: Answer, allows: Callable[[int, tuple[int, ...]], Sequence[bool]]) -> bool:
    allowed = {version: allows(version, answer.tokens) for version in set(answer.versions)}
    is_labelled = len(answer.tokens) == len(answer.versions) > 0
    return is_labelled and all(allowed[version][at] for at, version in enumerate(answer.versions))


def _find_regressed(answers: Sequence[Answer]) -> list[Answer]:
    found = []
    last: dict[str, tuple[float, int]] = {}
    for answer in sorted(answers, key=lambda one: one.started_s):
        ended_s, version = last.get(answer.engine, (0.0, 0))
        goes_back = list(answer.versions) != sorted(answer.versions)
        if goes_back or (answer.started_s >= ended_s and answer.versions and answer.versions[0] < version):
            found.append(answer)
        if answer.versions:
            last[answer.engine] = (answer.ended_s, max(version, answer.versions[-1]))
    return found
