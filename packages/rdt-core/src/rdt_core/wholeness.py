"""Whether the ranks of an engine hold one and the same version, from what they say of themselves.

An engine of several ranks may compute only while they do. An adapter asks when a commit has failed: some
ranks may have flipped, and others not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rdt_core.errors import EngineTornError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def are_whole(states: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no rank is torn, and all hold one version of one session.

    A group that counts anew may give a number to other bytes than before, so the number alone says nothing.

    Args:
        states: of every rank, from :meth:`rdt_core.subscriber.WeightSubscriber.status`.
    """
    held = {(state["version"], state["session"]) for state in states}
    return len(held) == 1 and not any(state["is_torn"] for state in states)


def find_torn(engine: str, answers: Sequence[Mapping[str, Any]]) -> EngineTornError | None:
    """Why an engine must not generate; None while its ranks are whole.

    Args:
        engine: its name and version, for the error.
        answers: of every rank to ``status``: ``{"ok": bool, "result": ...}``. One that cannot answer may hold
            anything.
    """
    states = [answer["result"] for answer in answers if answer["ok"]]
    if len(states) == len(answers) and are_whole(states):
        return None
    return EngineTornError(engine, min((int(state["version"]) for state in states), default=0))
