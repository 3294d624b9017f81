"""What came of a chaos run, as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.chaos.holdings import find_grown
from tests.chaos.model import Reference
from tests.chaos.verdict import judge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.chaos.holdings import Holdings
    from tests.chaos.session import Session


def describe(
    session: Session, before: Mapping[str, Holdings], after: Mapping[str, Holdings]
) -> dict[str, Any]:
    """A run that has ended, as plain values; ``reasons`` is empty when it was good.

    Args:
        session: whose load has stopped.
        before: what the processes held when the load began.
        after: what they hold now.
    """
    answers = [answer for load in session.loads for answer in load.answers]
    verdict = judge(answers, Reference().allows)
    late = [f"an answer of {load.name} took over a minute" for load in session.loads for _ in load.hung_s]
    raised = [f"an answer of {load.name}: {load.error!r}" for load in session.loads if load.error is not None]
    wrong: dict[str, list[str]] = {
        "mixed": [str(answer) for answer in verdict.mixed[:20]],
        "regressed": [str(answer) for answer in verdict.regressed[:20]],
        "hangs": session.hangs + late,
        "grown": find_grown(before, after, session.num_reconnects),
        "exceptions": raised,
        "silent": [load.name for load in session.loads if not load.answers],
    }
    return {
        "reasons": [f"{name}: {len(whats)}, the first: {whats[0]}" for name, whats in wrong.items() if whats],
        "answers": len(answers),
        "answers_by_engine": {load.name: len(load.answers) for load in session.loads},
        "spanning_two_versions": sum(len(set(answer.versions)) > 1 for answer in answers),
        "versions_published": session.version,
        "versions_seen": len({version for answer in answers for version in answer.versions}),
        "updates": dict(session.updates),
        "faults": dict(session.faults),
        "refused_as_torn": sum(load.num_refused for load in session.loads),
        "aborted_as_torn": sum(load.num_aborted for load in session.loads),
        "broken_by_a_killed_engine": sum(load.num_broken for load in session.loads),
        "longest_call_s": round(session.longest_call_s, 1),
        **wrong,
        "held_before": {name: str(held) for name, held in before.items()},
        "held_after": {name: str(held) for name, held in after.items()},
    }
