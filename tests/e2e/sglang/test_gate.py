"""What a pipeline's gate says of idleness, in the one turn after a prefill that a server cannot be held at.

The scheduler here stands in for that turn; real pipelines pass the gate in test_modes.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rdt_sglang.compat import StageGate

# SGLang and what it imports warn of this and that while they are imported.
pytestmark = pytest.mark.filterwarnings("default")


def make_scheduler(*held: int) -> Any:
    """As much of a stage as a gate sees: how many requests each slot holds of a prefill that has come out."""
    batches = [
        SimpleNamespace(is_empty=lambda count=count: not count) if count >= 0 else None for count in held
    ]
    return SimpleNamespace(
        last_mbs=batches,
        pp_loop_size=len(batches),
        last_batch=None,
        _engine_paused=False,
        get_next_batch_to_run=lambda **_: "the next one",
        maybe_sleep_on_idle=lambda: None,
        # SGLang asks about the slot that it has come to, which is the last.
        is_fully_idle=lambda **_: batches[-1] is None or batches[-1].is_empty(),
    )


@pytest.mark.parametrize("is_paused", [True, False])
def test_a_stage_whose_prefill_waits_behind_a_closed_gate_is_not_idle(is_paused: bool) -> None:
    scheduler = make_scheduler(4, -1)
    gate = StageGate(scheduler)
    assert scheduler.is_fully_idle()
    if is_paused:
        scheduler._engine_paused = True
    else:
        gate.drain(lambda: None)
    assert not scheduler.is_fully_idle(ignore_waiting=True)


def test_a_stage_behind_a_closed_gate_that_holds_nothing_is_idle() -> None:
    scheduler = make_scheduler(0, -1)
    StageGate(scheduler).drain(lambda: None)
    assert scheduler.is_fully_idle(for_health_check=True)


@pytest.mark.parametrize("is_paused", [True, False])
def test_a_stage_is_not_idle_before_every_slot_has_had_its_turn_at_the_open_gate(is_paused: bool) -> None:
    scheduler = make_scheduler(4, -1)
    gate = StageGate(scheduler)

    def plan() -> Any:
        return scheduler.get_next_batch_to_run(running_batch=None, last_batch=None)

    if is_paused:
        scheduler._engine_paused = True
        assert plan().batch_to_run is None
        scheduler._engine_paused = False
    else:
        gate.drain(lambda: None)
        assert [plan().batch_to_run for _ in scheduler.last_mbs] == [None, None]
    # The gate opens at the second slot, whose turn it is. The first has not moved its requests on yet.
    assert plan() == "the next one"
    assert not scheduler.is_fully_idle()
    assert plan() == "the next one"
    assert scheduler.is_fully_idle()
