"""Calls beside the model's thread, and what they carry back to it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rdt_core.errors import DeadlineError
from rdt_core.model_thread import BackgroundCall, ModelThread


def take_turns_until_done(thread: ModelThread, call: BackgroundCall) -> dict[str, object]:
    while call.is_running:
        thread.take_turn()
    assert call.answer is not None
    return call.answer


def test_a_function_from_another_thread_runs_in_the_models_thread_at_its_next_turn() -> None:
    thread = ModelThread()
    call = BackgroundCall("1", lambda: {"ran_in": thread.run(threading.get_ident)})
    assert take_turns_until_done(thread, call) == {"ran_in": threading.get_ident()}


def test_in_the_models_thread_itself_it_runs_at_once() -> None:
    assert ModelThread().run(lambda: 7) == 7


def test_what_the_function_raises_is_raised_where_it_was_asked_for() -> None:
    thread = ModelThread()

    def fail() -> None:
        raise LookupError("from the model's thread")

    def ask() -> dict[str, object]:
        with pytest.raises(LookupError, match="from the model's thread"):
            thread.run(fail)
        return {"raised": True}

    assert take_turns_until_done(thread, BackgroundCall("1", ask)) == {"raised": True}


def test_without_a_turn_in_time_the_function_never_runs() -> None:
    thread, ran = ModelThread(timeout_s=0.01), list[int]()
    with ThreadPoolExecutor(1) as pool, pytest.raises(DeadlineError, match="runs the model"):
        pool.submit(thread.run, lambda: ran.append(1)).result(10)
    thread.take_turn()
    assert ran == []


def test_a_call_has_no_answer_while_it_runs() -> None:
    may_end = threading.Event()
    call = BackgroundCall("mine", lambda: {"ended": may_end.wait(10)})
    assert call.number == "mine"
    assert call.is_running
    assert call.answer is None
    may_end.set()
    call.join(10)
    assert call.answer == {"ended": True}
