"""Dropping caches beside requests that wait, in an SGLang that says what waits is using them.

The scheduler here has as much of 0.5.17's as that needs; the version that is tested elsewhere is newer.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rdt_sglang.compat import drop_caches


class OlderScheduler:
    """Refuses to drop its caches while any request is queued (managers/scheduler.py, 0.5.17)."""

    def __init__(self, *waiting: object) -> None:
        self.waiting_queue = [SimpleNamespace(kv=kv) for kv in waiting]
        self.has_dropped = False

    def is_fully_idle(self, for_health_check: bool = False) -> bool:
        return not self.waiting_queue and not for_health_check

    def flush_cache(self, empty_cache: bool = True) -> bool:
        self.has_dropped = self.is_fully_idle() and not empty_cache
        return self.has_dropped


@pytest.mark.parametrize("waiting", [(), (None,), (None, None)])
def test_requests_that_own_nothing_of_the_cache_wait_on_and_do_not_keep_it(waiting: tuple[object]) -> None:
    scheduler = OlderScheduler(*waiting)
    queue = scheduler.waiting_queue
    assert drop_caches(scheduler)
    assert scheduler.has_dropped
    assert scheduler.waiting_queue is queue
    assert len(queue) == len(waiting)


def test_a_request_that_owns_memory_of_the_cache_keeps_it_and_its_place() -> None:
    scheduler = OlderScheduler(None, "its blocks")
    queue = scheduler.waiting_queue
    assert not drop_caches(scheduler)
    assert not scheduler.has_dropped
    assert scheduler.waiting_queue is queue
