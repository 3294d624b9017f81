"""A coordinator's work for one version grows with its ranks, not with their square."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from rdt_core import signals
from rdt_core.coordinator import Coordinator
from rdt_core.line import pack
from rdt_core.signals import Signal
from rdt_core.words import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

TIMEOUT_S = 30.0
NUM_RANKS = 64


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that a call which waits was woken to look again."""
    made: list[int] = []
    rest = Signal._rest

    async def counted(signal: Signal, timeout_s: float) -> None:
        await rest(signal, timeout_s)
        made.append(1)

    monkeypatch.setattr(Signal, "_rest", counted)
    # On a machine that takes a second for a test, nobody looks by itself.
    monkeypatch.setattr(signals, "LOOK_S", TIMEOUT_S)
    return made


async def attached() -> Coordinator:
    coordinator = Coordinator("group")
    for rank in range(NUM_RANKS):
        await coordinator.attach(rank, NUM_RANKS, str(rank), b"")
        await coordinator.join("engine", rank, {})
    return coordinator


def begin(calls: list[Coroutine[object, object, object]]) -> list[asyncio.Task[object]]:
    return [asyncio.ensure_future(call) for call in calls]


def run(history: Callable[[Coordinator], Coroutine[object, object, None]]) -> None:
    async def whole() -> None:
        await asyncio.wait_for(history(await attached()), TIMEOUT_S)

    asyncio.run(whole())


def test_a_version_wakes_each_who_waits_for_it_once(looks: list[int]) -> None:
    async def history(coordinator: Coordinator) -> None:
        begin([coordinator.next_tasks(rank, str(rank)) for rank in range(NUM_RANKS)])
        topology, life = await coordinator.topology(), (await coordinator.status())["life"]
        names = [("engine", rank) for rank in range(NUM_RANKS)]
        waiting = begin([coordinator.begin_read(*name, 1, topology, TIMEOUT_S, TIMEOUT_S) for name in names])
        published = begin([coordinator.wait_published(1, TIMEOUT_S)])
        await asyncio.sleep(0)
        for rank in range(NUM_RANKS):
            await coordinator.publish(rank, str(rank), 1)
        leases = await asyncio.gather(*waiting)
        await asyncio.gather(*published)
        releasing = begin([coordinator.release(rank, str(rank), TIMEOUT_S) for rank in range(NUM_RANKS)])
        prepared = begin([coordinator.wait_prepared("attempt", names, life, TIMEOUT_S)])
        await asyncio.sleep(0)
        for (engine, rank), lease in zip(names, leases, strict=True):
            assert isinstance(lease, int)
            await coordinator.end_read(lease, 1)
            await coordinator.report_prepared(engine, rank, "attempt", Outcome())
        assert await asyncio.gather(*releasing) == [[]] * NUM_RANKS
        assert await prepared[0] == dict.fromkeys(names, Outcome())

    run(history)
    # Every engine rank and every trainer rank once, and the driver twice.
    assert len(looks) <= 2 * NUM_RANKS + 2


def test_a_question_wakes_those_who_are_asked_and_who_asks(looks: list[int]) -> None:
    async def history(coordinator: Coordinator) -> None:
        async def answer(rank: int) -> None:
            for task in await coordinator.next_tasks(rank, str(rank)):
                await coordinator.answer(task.number, Outcome(rank))

        asked = begin([coordinator.ask("export", {rank: {}}, TIMEOUT_S) for rank in range(NUM_RANKS)])
        await asyncio.sleep(0)
        await asyncio.gather(*(answer(rank) for rank in range(NUM_RANKS)))
        assert await asyncio.gather(*asked) == [{rank: rank} for rank in range(NUM_RANKS)]

    run(history)
    assert len(looks) <= 3 * NUM_RANKS


def test_what_every_read_says_of_the_trainers_does_not_grow_with_them() -> None:
    async def measure() -> None:
        assert len(pack(await (await attached()).topology())) < 100

    asyncio.run(measure())
