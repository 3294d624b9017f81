"""What one version costs a group's coordinator, against the number of ranks on either side.

    python benchmarks/coordinator.py --json benchmarks/results/coordinator.json

The coordinator in a process of its own, without Ray around it; as many trainer ranks as engine ranks, and a
driver, over its line, all of them in one other process, so that the times hold the work of both. Every
trainer rank's request for tasks is held open, as it is in a real group. No byte of a weight is moved.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import struct
import time
from typing import TYPE_CHECKING, Any

import psutil
from by_size import run_by_size

from rdt_core.coordinator import POLL_S
from rdt_core.errors import RdtError
from rdt_core.line import LineAddress, LineServer, pack, unpack
from rdt_core.peers import GroupCoordinator
from rdt_core.process_limits import open_many_files
from rdt_core.words import Outcome

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from multiprocessing.connection import Connection

SIZES = (8, 64, 256, 1_024)
WARM_UP, VERSIONS = 1, 5
NUM_SOURCES = 8
"""Trainer ranks that an engine rank reads from."""
TIMEOUT_S = 600.0
IDLE_S = 8.0
ENGINE = "engine"
_LENGTH = struct.Struct("!I")


async def serve(pipe: Connection, num_ranks: int) -> None:
    """Body of the coordinator's process: a group whose members have joined, until it is killed."""
    coordinator = GroupCoordinator("benchmark")
    for rank in range(num_ranks):
        await coordinator.attach(rank, num_ranks, str(rank), b"")
        await coordinator.join(ENGINE, rank, {})
    polls = [asyncio.create_task(answer_tasks(coordinator, rank)) for rank in range(num_ranks)]
    began = time.perf_counter()
    await asyncio.gather(*(ask_sources(coordinator, rank, num_ranks) for rank in range(num_ranks)))
    exports_s = time.perf_counter() - began
    for poll in polls:
        poll.cancel()
    line = LineServer(coordinator)
    address = await line.listen("127.0.0.1")
    life = (await coordinator.status())["life"]
    pipe.send((address, await coordinator.topology(), life, exports_s))
    await asyncio.Event().wait()


async def answer_tasks(coordinator: GroupCoordinator, rank: int) -> None:
    """What a trainer rank's service threads do."""
    while True:
        for task in await coordinator.next_tasks(rank, str(rank)):
            await coordinator.answer(task.number, Outcome())


async def ask_sources(coordinator: GroupCoordinator, rank: int, num_ranks: int) -> None:
    """What an engine rank asks when it connects."""
    sources = {(rank + step) % num_ranks: {"reader": f"{ENGINE}#{rank}"} for step in range(NUM_SOURCES)}
    await coordinator.ask("export", sources, TIMEOUT_S)


class Member:
    """One member's connection to the coordinator."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, address: LineAddress) -> Member:
        """A connection that the coordinator answers."""
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(address.secret)
        return cls(reader, writer)

    async def call(self, method: str, *args: object) -> Any:
        """One call, and its answer."""
        body = pack([method, list(args), ""])
        self._writer.write(_LENGTH.pack(len(body)) + body)
        (nbytes,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
        answer = unpack(await self._reader.readexactly(nbytes))
        if isinstance(answer, RdtError):
            raise answer
        return answer


class Group:
    """All members of the group.

    Args:
        trainers: one a rank.
        engines: one a rank.
        driver: the driver's.
        topology: of the trainers.
        life: of the coordinator.
    """

    def __init__(
        self, trainers: Sequence[Member], engines: Sequence[Member], driver: Member, topology: str, life: str
    ) -> None:
        self._trainers, self._engines, self._driver = trainers, engines, driver
        self._topology, self._life = topology, life

    async def sync(self, version: int) -> dict[str, float]:
        """One version, asked for ahead and read at once; seconds of its phases."""
        names = [(ENGINE, rank) for rank in range(len(self._engines))]
        attempt = f"attempt-{version}"
        reads = [asyncio.create_task(self._begin(rank, version)) for rank in range(len(names))]
        published = asyncio.create_task(self._driver.call("wait_published", version, TIMEOUT_S))
        await asyncio.sleep(0.2)  # until all of them wait
        began = time.perf_counter()
        await gather(
            trainer.call("publish", rank, str(rank), version, 0)
            for rank, trainer in enumerate(self._trainers)
        )
        leases = await gather(reads)
        await published
        admitted = time.perf_counter()
        releases = [
            asyncio.create_task(trainer.call("release", rank, str(rank), TIMEOUT_S))
            for rank, trainer in enumerate(self._trainers)
        ]
        await asyncio.sleep(0.2)  # until all of them wait for the leases
        ending = time.perf_counter()
        prepared = asyncio.create_task(
            self._driver.call("wait_prepared", attempt, names, self._life, TIMEOUT_S)
        )
        await gather(self._end(rank, lease, version, attempt) for rank, lease in enumerate(leases))
        await prepared
        await gather(releases)
        return {"publish_to_admitted_s": admitted - began, "read_to_released_s": time.perf_counter() - ending}

    async def _begin(self, rank: int, version: int) -> int:
        arguments = (ENGINE, rank, version, self._topology, TIMEOUT_S, TIMEOUT_S)
        return int(await self._engines[rank].call("begin_read", *arguments))

    async def _end(self, rank: int, lease: int, version: int, attempt: str) -> None:
        await self._engines[rank].call("end_read", lease, version)
        await self._engines[rank].call("report_prepared", ENGINE, rank, attempt, Outcome())


async def poll(member: Member, rank: int) -> None:
    """A trainer rank's requests for tasks; there are none."""
    while True:
        await member.call("next_tasks", rank, str(rank), 0)


async def gather(calls: Any) -> list[Any]:
    """The results of all."""
    return list(await asyncio.gather(*calls))


async def measure_group(pipe: Connection, pid: int, num_ranks: int) -> dict[str, Any]:
    """Syncs of a group whose coordinator is at the other end of the pipe."""
    address, topology, life, exports_s = pipe.recv()
    members = [await Member.connect(address) for _ in range(2 * num_ranks + 1)]
    group = Group(members[:num_ranks], members[num_ranks:-1], members[-1], topology, life)
    process = psutil.Process(pid)
    polls = [asyncio.create_task(poll(await Member.connect(address), rank)) for rank in range(num_ranks)]
    await asyncio.sleep(POLL_S)
    before = cpu_s(process)
    await asyncio.sleep(IDLE_S)
    idle_share = round((cpu_s(process) - before) / IDLE_S, 4)
    samples: list[dict[str, float]] = []
    for version in range(1, WARM_UP + VERSIONS + 1):
        before = cpu_s(process)
        sample = await group.sync(version)
        samples.append({**sample, "coordinator_cpu_s": cpu_s(process) - before})
    for request in polls:
        request.cancel()
    counted = samples[WARM_UP:]
    medians = {name: round(statistics.median(s[name] for s in counted), 5) for name in counted[0]}
    facts = {"exports_s": round(exports_s, 5), "idle_share_of_a_core": idle_share}
    return {"num_trainer_ranks": num_ranks, "num_engine_ranks": num_ranks, **facts, **medians}


def cpu_s(process: psutil.Process) -> float:
    """Processor time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run it with as many open sockets as the system gives."""
    open_many_files()
    return asyncio.run(coroutine)


def run_coordinator(pipe: Connection, num_ranks: int) -> None:
    """Entry point of the coordinator's process."""
    run(serve(pipe, num_ranks))


def measure(num_ranks: int) -> dict[str, Any]:
    """One row."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_coordinator, args=(theirs, num_ranks), daemon=True)
    process.start()
    row: dict[str, Any] = run(measure_group(ours, process.pid or 0, num_ranks))
    process.kill()
    process.join(TIMEOUT_S)
    return row


if __name__ == "__main__":
    run_by_size("coordinator", __file__, SIZES, measure)
