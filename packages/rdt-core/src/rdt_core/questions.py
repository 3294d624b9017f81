"""What trainer ranks were asked to do for somebody who waits, and what they answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdt_core.signals import Signal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rdt_core.words import Outcome


class Question:
    """Tasks of one call, each given to a rank.

    Args:
        ranks: by the number of the task.
        clock: seconds, growing.

    Attributes:
        unanswered: ranks by the number of their task.
        outcomes: the answers so far, by rank.
        changed: tells that the last answer is there, or that ranks have come or gone.
    """

    def __init__(self, ranks: Mapping[int, int], clock: Callable[[], float]) -> None:
        self.unanswered = dict(ranks)
        self.outcomes: dict[int, Outcome] = {}
        self.changed = Signal(clock)

    def note(self, number: int, outcome: Outcome) -> None:
        """A rank's answer; the first to a task counts."""
        rank = self.unanswered.pop(number, None)
        if rank is not None:
            self.outcomes[rank] = outcome
        if not self.unanswered:
            self.changed.wake()


class OpenQuestions:
    """All questions that somebody waits for, by the numbers of their tasks."""

    def __init__(self) -> None:
        self._by_number: dict[int, Question] = {}

    def open(self, question: Question) -> None:
        """Its answers are waited for from now on."""
        self._by_number.update(dict.fromkeys(question.unanswered, question))

    def answer(self, number: int, outcome: Outcome) -> None:
        """An answer; dropped when nobody waits for it any more."""
        question = self._by_number.pop(number, None)
        if question is not None:
            question.note(number, outcome)

    def close(self, question: Question) -> None:
        """Nobody waits for the answers that are not there."""
        for number in question.unanswered:
            self._by_number.pop(number, None)

    def look_again(self) -> None:
        """Ranks have come or gone."""
        for question in set(self._by_number.values()):
            question.changed.wake()
