"""How publishers, subscribers and drivers call a group's coordinator."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, cast

from rdt_core import __version__, ray_session, tracing
from rdt_core.coordinator import POLL_S
from rdt_core.errors import (
    CoordinatorLostError,
    DeadlineError,
    RdtError,
    UnknownGroupError,
    VersionSkewError,
)
from rdt_core.line import Line, LineServer, is_taken
from rdt_core.patience import RestartingError, call_patiently
from rdt_core.peers import GroupCoordinator, LenderChannel, landing_name
from rdt_core.process_limits import leave_niceness, open_many_files
from rdt_core.ray_session import NAMESPACE
from rdt_core.words import NOTHING_SAID, LastWords, Outcome, TrainerTask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rdt_core.line import LineAddress

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0
"""For a call that the coordinator answers without waiting for anyone."""

ATTACH_TIMEOUT_S = 60.0
"""For the first call to a coordinator, which may have to wait for its actor to start."""

_END_LOOK_S = 0.01
"""How often the last trainer rank that leaves looks whether the coordinator has ended."""

_MAX_CALLS = 100_000
"""That may be under way at once through Ray, which has 1,000 by default; some are held open."""


class Channel(Protocol):
    """Runs a coordinator's coroutine and returns its result, wherever the coordinator lives."""

    def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """Block until the result is there.

        Raises:
            RdtError: whatever the coordinator raised.
            DeadlineError: no answer within ``timeout_s`` seconds.
            CoordinatorLostError: the coordinator ended.
        """

    def start(self, method: str, *args: object) -> Callable[[float], Any]:
        """Begin a call without waiting; returns what waits for its result, given a deadline in seconds."""

    def end(self) -> None:
        """End the coordinator itself. Called by the last trainer rank that leaves. Idempotent."""


class _ActorCoordinator(GroupCoordinator):
    """The coordinator inside its actor.

    Tickets of Ray's tensor transports carry torch dtypes. Importing torch while it unpickles the first one
    would hold the actor's event loop, and every member's deadline, for seconds; so it happens at start.
    """

    def __init__(self, group: str) -> None:
        leave_niceness()
        open_many_files()
        importlib.import_module("torch")
        super().__init__(group)
        self._line = LineServer(self)

    async def open_line(self) -> LineAddress:
        """Where this coordinator answers beside Ray."""
        import ray  # noqa: PLC0415

        return await self._line.listen(ray.util.get_node_ip_address())


class RayChannel:
    """A channel to the group's named Ray actor. Make one with :meth:`create` or :meth:`find`.

    The calls of a sync go over the coordinator's line; without one, which is told once, all go through Ray.
    """

    def __init__(self, group: str, actor: Any) -> None:
        self._group, self._actor = group, actor
        self._line: Line | None = None
        self._has_asked = False
        self._asking = threading.Lock()

    @classmethod
    def create(cls, group: str) -> RayChannel:
        """The group's coordinator, started if there is none. Trainer ranks call this."""
        import ray  # noqa: PLC0415  ray is loaded on first use, not on import

        options = {"name": actor_name(group), "namespace": NAMESPACE, "get_if_exists": True}
        actor = (
            ray.remote(_ActorCoordinator)
            .options(
                **options,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=_MAX_CALLS,
            )
            .remote(group)
        )
        return cls(group, actor)

    @classmethod
    def find(cls, group: str) -> RayChannel:
        """The group's coordinator, which trainers have started. Engines and drivers call this.

        Raises:
            UnknownGroupError: no trainer has attached under this name.
        """
        import ray  # noqa: PLC0415

        try:
            return cls(group, ray.get_actor(actor_name(group), namespace=NAMESPACE))
        except ValueError:
            raise UnknownGroupError(group, NAMESPACE) from None

    def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """See :class:`Channel`."""
        return call_patiently(lambda left_s: self.start(method, *args, timeout_s=left_s), timeout_s)

    def start(
        self, method: str, *args: object, timeout_s: float = ATTACH_TIMEOUT_S
    ) -> Callable[[float], Any]:
        """See :class:`Channel`. A first call asks for the line before, and waits for that."""
        is_for_line = is_taken(method, args)
        if (self._line is None or not is_for_line) and not ray_session.is_node_there():
            raise CoordinatorLostError(self._group, "the Ray node of this process has ended")
        line = self._find_line(timeout_s) if is_for_line else None
        if line is None:
            ref = self._call_actor(method, args, tracing.traceparent())
            return lambda timeout_s: self._result(ref, method, timeout_s)
        try:
            wait = line.start(method, *args)
        except CoordinatorLostError as error:
            self._drop_line(line)
            raise RestartingError(self._group, error.detail) from error

        def result(timeout_s: float) -> Any:
            try:
                return wait(timeout_s)
            except CoordinatorLostError as error:
                # The coordinator itself may be the one to say so: then its line is sound.
                if isinstance(error.__cause__, OSError):
                    self._drop_line(line)
                    raise RestartingError(self._group, error.detail) from error
                raise

        return result

    def _call_actor(self, method: str, args: tuple[object, ...] = (), traceparent: str = "") -> Any:
        """Call through Ray, which checks the arguments here, against the class that the trainers sent it."""
        try:
            if traceparent:
                return self._actor.call.remote(method, args, traceparent)
            return getattr(self._actor, method).remote(*args)
        except (AttributeError, TypeError):
            # A class that cannot be loaded here Ray replaces by one whose methods take no arguments.
            raise VersionSkewError(self._group, method, __version__) from None

    def _drop_line(self, line: Line) -> None:
        """Ask for another line before the next call; a coordinator that was restarted has a new one."""
        with self._asking:
            if self._line is line:
                self._line, self._has_asked = None, False
        line.close()

    def _find_line(self, timeout_s: float) -> Line | None:
        with self._asking:
            if not self._has_asked:
                address = self._result(self._call_actor("open_line"), "open_line", timeout_s)
                self._has_asked = True
                try:
                    self._line = Line(address, self._group)
                except OSError as error:
                    logger.warning(
                        "%s:%d of the coordinator of group %s cannot be reached (%s). Every call of a sync "
                        "goes through Ray and takes a millisecond more; open the port range to gain it.",
                        address.host,
                        address.port,
                        self._group,
                        error,
                    )
        return self._line

    def _result(self, ref: Any, method: str, timeout_s: float) -> Any:
        import ray  # noqa: PLC0415
        from ray import exceptions  # noqa: PLC0415

        try:
            return ray.get(ref, timeout=timeout_s)
        except exceptions.GetTimeoutError:
            raise DeadlineError(
                f"the coordinator of group {self._group!r} to answer {method}",
                timeout_s,
                "Look for a stopped Ray node or actor.",
            ) from None
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, RdtError):
                raise error.cause from None
            raise RdtError(
                f"the coordinator of group {self._group!r} failed in {method}: {_last_line(error)}. "
                "Expected an answer or one of our errors; report this with the coordinator's log."
            ) from error
        except exceptions.ActorUnavailableError as error:
            raise RestartingError(self._group, type(error).__name__) from error
        except exceptions.RayError as error:
            raise CoordinatorLostError(self._group, type(error).__name__) from error

    def end(self) -> None:
        """See :class:`Channel`."""
        import ray  # noqa: PLC0415
        from ray import exceptions  # noqa: PLC0415

        ray.kill(self._actor)
        # Killing is a request: until it is carried out, a trainer that attaches again would find this one.
        deadline, pause = time.monotonic() + CALL_TIMEOUT_S, threading.Event()
        while time.monotonic() < deadline and ray_session.is_node_there():
            try:
                ray.get(self._actor.session.remote(), timeout=1.0)
            except exceptions.ActorDiedError:
                return
            except exceptions.RayError:
                pass  # it is dying
            pause.wait(_END_LOOK_S)
        logger.warning("the coordinator of group %s was told to end and has not yet", self._group)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


class LocalChannel:
    """A coordinator on an event loop in this process: the fake that unit and contract tests use.

    Args:
        group: its name.
        clock: seconds, growing; every deadline of the coordinator is measured on it.
    """

    def __init__(self, group: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"rdt-{group}", daemon=True)
        self._thread.start()
        self._group, self._clock = group, clock
        self._coordinator = GroupCoordinator(group, clock)

    def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """See :class:`Channel`."""
        return call_patiently(lambda _: self.start(method, *args), timeout_s)

    def start(self, method: str, *args: object) -> Callable[[float], Any]:
        """See :class:`Channel`."""
        if not self._loop.is_running():
            raise CoordinatorLostError(self._group, "its event loop has stopped")
        answer = self._coordinator.call(method, args, tracing.traceparent())
        future = asyncio.run_coroutine_threadsafe(answer, self._loop)

        def result(timeout_s: float) -> Any:
            try:
                return future.result(timeout_s)
            except concurrent.futures.CancelledError:
                raise RestartingError(self._group, "it was restarted in mid-call") from None
            except concurrent.futures.TimeoutError:
                future.cancel()
                what = f"the coordinator in this process to answer {method}"
                raise DeadlineError(what, timeout_s, "It is busy or stopped.") from None

        return result

    def restart(self) -> None:
        """Lose the coordinator and all it knew, as when its actor's process dies; calls under way fail."""

        async def replace() -> None:
            self._coordinator = GroupCoordinator(self._group, self._clock)
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()

        asyncio.run_coroutine_threadsafe(replace(), self._loop).result(CALL_TIMEOUT_S)

    def end(self) -> None:
        """See :class:`Channel`."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)


def list_groups() -> list[str]:
    """Names of all groups that have a coordinator in the cluster that this process has joined, sorted."""
    import ray  # noqa: PLC0415

    named = ray.util.list_named_actors(all_namespaces=True)
    ours = (entry["name"] for entry in named if entry["namespace"] == NAMESPACE)
    return sorted(name.removeprefix(actor_name("")) for name in ours if name.startswith(actor_name("")))


def actor_name(group: str) -> str:
    """Name of a group's coordinator among the actors of the Ray namespace."""
    return f"rdt:{group}"


def _nothing(timeout_s: float) -> None:
    """What there is to wait for before the first record."""


class CoordinatorClient:
    """The coordinator's methods, typed, with a deadline on every call.

    See :class:`rdt_core.coordinator.Coordinator` for each.

    Args:
        channel: how to reach it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._recorded: Callable[[float], Any] = _nothing

    def of_lender(self, engine: str) -> CoordinatorClient:
        """A client for what ``engine`` lends: its ranks stand there where trainer ranks stand here."""
        return CoordinatorClient(LenderChannel(self._channel, engine))

    def of_landing(self, engine: str, rank: int) -> CoordinatorClient:
        """A client for what an engine rank landed and offers to its neighbours, see :mod:`rdt_core.relay`."""
        return self.of_lender(landing_name(engine, rank))

    def attach(
        self, rank: int, world_size: int, instance: str, manifest: bytes, last: LastWords = NOTHING_SAID
    ) -> int:
        """Offer a trainer rank's manifest; returns the version that it must go beyond."""
        return cast(
            "int",
            self._channel.call(
                "attach", rank, world_size, instance, manifest, last, timeout_s=ATTACH_TIMEOUT_S
            ),
        )

    def next_tasks(self, rank: int, instance: str, version: int = 0) -> list[TrainerTask]:
        """Tasks for a trainer rank that has published ``version``, after at most ``POLL_S``."""
        return cast(
            "list[TrainerTask]",
            self._channel.call("next_tasks", rank, instance, version, timeout_s=POLL_S + CALL_TIMEOUT_S),
        )

    def end_tasks(self, rank: int, instance: str) -> None:
        """Have :meth:`next_tasks` return at once from now on. In vain it takes no longer than that would."""
        self._channel.call("end_tasks", rank, instance, timeout_s=POLL_S)

    def answer(self, number: int, outcome: Outcome) -> None:
        """Answer a task."""
        self._channel.call("answer", number, outcome, timeout_s=CALL_TIMEOUT_S)

    def publish(self, rank: int, instance: str, version: int, arena_bytes: int = 0) -> None:
        """Say that a trainer rank's memory holds ``version``."""
        self.start_publish(rank, instance, version, arena_bytes)()

    def start_publish(
        self, rank: int, instance: str, version: int, arena_bytes: int = 0
    ) -> Callable[[], None]:
        """The same without waiting; returns what waits and raises what went wrong."""
        wait = self._channel.start("publish", rank, instance, version, arena_bytes)

        def settle() -> None:
            wait(CALL_TIMEOUT_S)

        return settle

    def release(self, rank: int, instance: str, timeout_s: float) -> list[tuple[str, int]]:
        """Wait for readers before a write; returns those who were cut off."""
        return cast(
            "list[tuple[str, int]]",
            self._channel.call("release", rank, instance, timeout_s, timeout_s=timeout_s + CALL_TIMEOUT_S),
        )

    def detach(self, rank: int, instance: str) -> None:
        """Leave; the last trainer rank ends the coordinator."""
        if self._channel.call("detach", rank, instance, timeout_s=CALL_TIMEOUT_S):
            self._channel.end()

    def session(self) -> str:
        """Identifies this life of the group."""
        return cast("str", self._channel.call("session", timeout_s=CALL_TIMEOUT_S))

    def manifests(self, timeout_s: float) -> list[bytes]:
        """Every trainer rank's manifest."""
        return cast(
            "list[bytes]", self._channel.call("manifests", timeout_s, timeout_s=timeout_s + CALL_TIMEOUT_S)
        )

    def ask(self, kind: str, payloads: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        """Have trainer ranks do something and return their answers."""
        return cast(
            "dict[int, Any]",
            self._channel.call("ask", kind, dict(payloads), timeout_s, timeout_s=timeout_s + CALL_TIMEOUT_S),
        )

    def topology(self) -> str:
        """Identifies the trainer processes."""
        return cast("str", self._channel.call("topology", timeout_s=CALL_TIMEOUT_S))

    def wait_published(self, version: int, timeout_s: float) -> tuple[str, int]:
        """Until every trainer rank has published ``version``; the coordinator's life, all arenas' bytes."""
        return cast(
            "tuple[str, int]",
            self._channel.call("wait_published", version, timeout_s, timeout_s=timeout_s + CALL_TIMEOUT_S),
        )

    def await_published(self, version: int, timeout_s: float) -> bool:
        """Whether waiting for ``version`` is over, held or not, after ``timeout_s`` at the latest."""
        return cast(
            "bool",
            self._channel.call("await_published", version, timeout_s, timeout_s=timeout_s + CALL_TIMEOUT_S),
        )

    def check_version(self, version: int, topology: str = "", wait_s: float = 0.0) -> str:
        """Whether every trainer rank holds ``version``, which is waited for ``wait_s`` at most.

        Returns:
            The coordinator's life; nothing where waiting is not over.
        """
        asked = (version, topology, wait_s)
        return cast("str", self._channel.call("check_version", *asked, timeout_s=wait_s + CALL_TIMEOUT_S))

    def begin_read(
        self, engine: str, rank: int, version: int, topology: str, timeout_s: float, wait_s: float = 0.0
    ) -> int:
        """Take a lease on a version, which is waited for ``wait_s`` at most; its number, 0 for none."""
        asked = (engine, rank, version, topology, timeout_s, wait_s)
        return int(self._channel.call("begin_read", *asked, timeout_s=wait_s + CALL_TIMEOUT_S))

    def start_read(
        self, engine: str, rank: int, version: int, topology: str, timeout_s: float, wait_s: float
    ) -> Callable[[], int]:
        """:meth:`begin_read` without waiting; returns what waits, and fails if the coordinator restarts."""
        wait = self._channel.start("begin_read", engine, rank, version, topology, timeout_s, wait_s)
        return lambda: int(wait(wait_s + CALL_TIMEOUT_S))

    def start_end_read(self, lease: int, version: int) -> Callable[[], None]:
        """:meth:`end_read` without waiting; returns what waits and raises."""
        wait = self._channel.start("end_read", lease, version)

        def settle() -> None:
            wait(CALL_TIMEOUT_S)

        return settle

    def end_read(self, lease: int, version: int) -> None:
        """Give a lease back; raises unless the version was there all the time."""
        self._channel.call("end_read", lease, version, timeout_s=CALL_TIMEOUT_S)

    def drop_lease(self, lease: int) -> None:
        """Give a lease back after a read that failed."""
        self._channel.call("drop_lease", lease, timeout_s=CALL_TIMEOUT_S)

    def join(self, engine: str, rank: int, info: dict[str, Any]) -> None:
        """An engine rank is connected."""
        self._channel.call("join", engine, rank, info, timeout_s=CALL_TIMEOUT_S)

    def leave(self, engine: str, rank: int) -> None:
        """An engine rank disconnects."""
        self._channel.call("leave", engine, rank, timeout_s=CALL_TIMEOUT_S)

    def report_prepared(self, engine: str, rank: int, attempt: str, outcome: Outcome) -> None:
        """How an engine rank's read ended."""
        self._channel.call("report_prepared", engine, rank, attempt, outcome, timeout_s=CALL_TIMEOUT_S)

    def wait_prepared(
        self, attempt: str, members: Sequence[tuple[str, int]], life: str, timeout_s: float
    ) -> dict[tuple[str, int], Outcome]:
        """The outcome of every member."""
        return cast(
            "dict[tuple[str, int], Outcome]",
            self._channel.call(
                "wait_prepared", attempt, list(members), life, timeout_s, timeout_s=timeout_s + CALL_TIMEOUT_S
            ),
        )

    def start_record(self, sync: dict[str, Any]) -> None:
        """Keep how a sync ended; not waited for."""
        earlier, self._recorded = self._recorded, self._channel.start("record", sync)
        earlier(CALL_TIMEOUT_S)

    def history(self) -> list[dict[str, Any]]:
        """The group's last syncs, oldest first."""
        return cast("list[dict[str, Any]]", self._channel.call("history", timeout_s=CALL_TIMEOUT_S))

    def status(self) -> dict[str, Any]:
        """Plain values about the group."""
        return cast("dict[str, Any]", self._channel.call("status", timeout_s=CALL_TIMEOUT_S))
