"""The driver's half: one object that takes a group's engines from version to version."""

from __future__ import annotations

import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

from rdt_core import choice, observer, ray_session, settings, tracing
from rdt_core.client import CoordinatorClient, RayChannel
from rdt_core.digest import RegionDigest, add_digests, check_replicas
from rdt_core.dtypes import itemsize_bytes
from rdt_core.engine_http import EngineHttp
from rdt_core.errors import (
    ConfigError,
    CoordinatorLostError,
    InvalidVersionError,
    RdtError,
    StaleVersionError,
)
from rdt_core.fan_out import AUTO as AUTO_FAN_OUT
from rdt_core.fan_out import check_policy, form_circles
from rdt_core.history import CoordinatorHistory
from rdt_core.lifecycle import SyncEvent, SyncLife
from rdt_core.member import Member
from rdt_core.mode import AUTO
from rdt_core.pacing import WITHOUT_REST, check_read_share
from rdt_core.progress import Progress
from rdt_core.read_method import ARENA_POLICIES
from rdt_core.report import VerifyReport
from rdt_core.round import ALL_OR_NONE, Round, UpdateOptions
from rdt_core.welcome import Welcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from rdt_core.client import Channel
    from rdt_core.member import EngineControl
    from rdt_core.observer import SyncObserver
    from rdt_core.report import SyncReport

logger = logging.getLogger(__name__)

_TRAINERS_TIMEOUT_S = 5.0
_MAX_ENGINES_AT_ONCE = 64


class WeightSync:
    """Drives the syncs of one group from trainers into running engines. Make one with :meth:`connect`.

    Lives in one driver process, not in the trainer ranks. All methods block and are called from one thread; a
    second call while one runs is refused.

    Args:
        client: of the group's coordinator.
        engines: how to reach each engine.
        asked: what :meth:`connect` tells every engine (group, ray_address, ray_auth_mode, transport, mode,
            timeout_s).
        observers: are told about every sync.
        commit_policy: of updates that do not say.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        engines: Sequence[EngineControl],
        asked: Mapping[str, Any],
        *,
        observers: Sequence[SyncObserver] = (),
        commit_policy: str = ALL_OR_NONE,
    ) -> None:
        self._commit_policy = UpdateOptions(commit_policy=commit_policy).commit_policy
        self._client = client
        self._group = str(asked["group"])
        self._asked = dict(asked)
        self._observers = (CoordinatorHistory(client), *observers)
        self._members = {engine.url: Member(engine) for engine in engines}
        self._pool = ThreadPoolExecutor(_MAX_ENGINES_AT_ONCE, thread_name_prefix="rdt-sync")
        self._life = SyncLife()
        self._session = ""

    @classmethod
    def connect(  # noqa: PLR0913  one keyword a choice that the user has
        cls,
        group: str,
        engines: Sequence[str],
        *,
        api_key: str | None = None,
        transport: str = choice.AUTO,
        mode: str = AUTO,
        arenas: str = "auto",
        fan_out: str = AUTO_FAN_OUT,
        read_share: float = WITHOUT_REST,
        commit_policy: str = ALL_OR_NONE,
        timeout_s: float = 120.0,
        observers: Sequence[SyncObserver] = (),
        channel: Channel | None = None,
    ) -> WeightSync:
        """Bring trainers and engines together: every engine rank plans its reads and opens its links.

        Called once, after every trainer rank has attached. Generation in an engine stands for the seconds
        that this takes. If one engine fails, none stays connected, and all serve what they served.

        Args:
            group: the name under which the trainer ranks attached.
            engines: URLs of the engine servers, ``"http://127.0.0.1:8000"``.
            api_key: of the engine servers, if they have one.
            transport: name of the transport for every link; by default the one that ``RDT_TRANSPORT`` forces,
                else for each link the best that both sides offer (:mod:`rdt_core.choice`).
            mode: ``"staged"`` reads beside the parameters while generation goes on; ``"pinned"`` does so into
                the host's memory, for a longer commit; ``"inplace"`` needs no memory for that, and holds
                generation while it reads into them; ``"auto"`` takes the first that has room, in every
                engine rank for itself.
            arenas: ``"auto"`` has trainer ranks hold packed and cast copies of what is cheaper to read that
                way, ``SyncReport.arena_bytes`` in all; ``"never"`` takes no memory of theirs.
            fan_out: whether engine ranks of one node that need the same read it from the trainers once, a
                share each, and the rest from each other. ``"auto"`` where that is a gain: 1 GiB a rank and
                more, on different GPUs, or from trainers on another node; ``"always"``; ``"never"``. Does not
                concern in-place reads.
            read_share: share of the time in which an engine rank moves bytes while it reads beside
                generation, more than 0 and up to 1. By default it reads as fast as its links go; at 0.25 a
                read of more than 64 MiB takes up to four times as long and generation feels about a quarter
                of it. Commits do not rest, nor in-place reads, which are part of them.
            commit_policy: of every update that does not say, see :meth:`update`.
            timeout_s: for each engine's connect, in seconds.
            observers: are told about every sync; metrics for instance.
            channel: how to reach the coordinator; by default the group's named Ray actor.

        Raises:
            NoRayClusterError, RayAuthError: this driver, or an engine, cannot join Ray.
            UnknownGroupError: no trainer has attached under this name.
            MissingTrainerRankError: some rank has not attached after 5 seconds.
            EngineUnreachableError: an address does not answer.
            EngineRefusedError: an engine was not started with ``--weight-sync rdt``, or wants a key.
            ModelMismatchError, PlanError: trainer and engine do not run the same model.
            TransportUnavailableError: no transport fits a link.
            TransportLiesError: a link brought other bytes than the trainer's.
        """
        if not engines or len(set(engines)) != len(engines):
            raise ConfigError(f"engines must be one or more different URLs, got {list(engines)!r}.")
        if arenas not in ARENA_POLICIES:
            raise ConfigError(f"arenas={arenas!r} is not a policy. Use one of {ARENA_POLICIES}.")
        read_share, fan_out = check_read_share(read_share), check_policy(fan_out)
        where = ray_session.RayAddress("")
        if channel is None:
            ray_session.join()
            channel, where = RayChannel.find(group), ray_session.current_address()
        client = CoordinatorClient(channel)
        client.manifests(_TRAINERS_TIMEOUT_S)
        asked = {
            "group": group,
            "ray_address": where.address,
            "ray_auth_mode": where.auth_mode,
            "transport": transport if transport != choice.AUTO else settings.read_transport(),
            "mode": mode,
            "arenas": arenas,
            "fan_out": fan_out,
            "read_share": read_share,
            "timeout_s": timeout_s,
        }
        reached = [EngineHttp(url, api_key=api_key) for url in engines]
        sync = cls(client, reached, asked, observers=observers, commit_policy=commit_policy)
        try:
            sync.join_all()
        except BaseException:
            # Ctrl-C too must leave no engine in a group that has no driver.
            sync.close()
            raise
        return sync

    def join_all(self) -> None:
        """Have every engine join the group, anew where it has. Called by :meth:`connect`.

        Raises:
            RdtError: of the first engine that did not.
        """
        session = self._client.session()
        self._on_all(lambda member: member.connect(self._asked, float(self._asked["timeout_s"])))
        # Only now: an engine that could not join still counts as holding what others gave it.
        self._session = session
        observer.tell(self._observers, lambda told: told.on_connected(self._group, self.engines))

    @property
    def version(self) -> int:
        """The version that every engine serves, or a later one; 0 before the first update."""
        return min((member.version for member in self._members.values()), default=0)

    @property
    def engines(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """What every engine rank answered to connect (tensors, bytes, reads, reload), by URL."""
        return {url: member.ranks for url, member in self._members.items() if member.is_connected}

    def update(
        self,
        version: int,
        *,
        mode: str | None = None,
        verify: str | None = None,
        kv_cache: str = "recompute",
        commit_policy: str | None = None,
        timeout_s: float = 120.0,
    ) -> SyncReport:
        """Bring every engine to ``version``; generation stands only while a rank copies locally.

        Waits until every trainer rank has published, has all engine ranks read, and commits when all have
        read everything. May be called before they publish: engine ranks are asked at once and wait too, so
        that the read begins with the publication. The trainer must not write its parameters before this
        returns, or only within ``publisher.writing()``. A call that fails costs the next one nothing; engines
        that it left at ``version`` are not asked again.

        Args:
            version: as given to ``publisher.publish``; greater than the last one.
            mode: from this update on, ``"staged"``, ``"pinned"`` or ``"inplace"`` for all engines; those
                connected in another one are connected again first, which takes seconds. By default each
                rank's own.
            verify: ``"digest"`` compares what every rank read with what the trainer ranks hold then, so that
                a write in mid-read without a word to us is an error. Reads the bytes once more on each side.
            kv_cache: ``"recompute"`` drops what the old weights left in the KV cache and recomputes running
                requests; ``"keep"`` leaves it.
            commit_policy: ``"group"``: no engine commits unless all have read everything. ``"engine"``: each
                commits for itself; those that failed are in the report and catch up with the next update. By
                default what :meth:`connect` was given.
            timeout_s: for each phase, in seconds.

        Raises:
            ConfigError: an argument is none of those listed.
            InvalidVersionError, StaleVersionError: the version is not greater than the last.
            NotPublishedError, ReleasedError, SupersededError: the trainer ranks do not hold it.
            UpdateFailedError: joining again, reading or committing failed; says on which rank and in which
                phase, and ``__cause__`` has the typed reason. In in-place mode an engine that failed to
                commit may be torn: it refuses to generate until an update succeeds.
            CoordinatorLostError, DeadlineError: the coordinator does not answer.
            BusyError, ClosedError: another call is under way, or this object was closed.
        """
        options = UpdateOptions(
            mode=mode,
            verify=verify,
            kv_cache=kv_cache,
            commit_policy=self._commit_policy if commit_policy is None else commit_policy,
            timeout_s=timeout_s,
        )
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise InvalidVersionError(version)
        if version <= self._newest and self._session != self._client.session():
            # The coordinator and all trainers were lost: what engines hold was counted by others.
            with self._changing():
                self.join_all()
        behind = [member for member in self._members.values() if member.version < version]
        if version < self._newest or not behind:
            raise StaleVersionError(version, self._newest, "synced")
        return self._update(behind, version, options)

    @property
    def _newest(self) -> int:
        """The highest version that an engine serves; 0 before the first update."""
        return max((member.version for member in self._members.values()), default=0)

    def add_engine(self, url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> int:
        """Have one more engine join; nobody else reconnects. Returns the version that it serves then.

        The newcomer gets the version that the others serve at once: from the trainers while they hold it, and
        from one of the engines when they write, have moved on or are gone. Where neither can give it, it
        keeps what it was started with until the next update, which is its first. Observers get a report of
        its first sync, whose ``source`` says whence the bytes came.

        Raises:
            ConfigError: the engine is a member already.
            UpdateFailedError: it joined and could not read; it is no member then.
            RdtError: as :meth:`connect` raises them; it is no member then.
        """
        return self.add_member(EngineHttp(url, api_key=api_key), timeout_s=timeout_s)

    def add_member(self, engine: EngineControl, *, timeout_s: float = 120.0) -> int:
        """Like :meth:`add_engine`, for an engine that is reached in another way than by HTTP."""
        if engine.url in self._members:
            engine.close()
            raise ConfigError(f"engine {engine.url} is a member already. Remove it first.")
        current = self._newest
        member = Member(engine)
        with self._changing():
            try:
                welcome = Welcome(self._client, self._pool, member, self._asked, timeout_s)
                report = welcome.join(list(self._members.values()), current)
            except BaseException:
                # Ctrl-C too must leave no engine in the group that this driver does not know.
                self._part_with(member)
                raise
            self._members[member.url] = member
        observer.tell(self._observers, lambda told: told.on_connected(self._group, self.engines))
        if report is not None:
            observer.tell(self._observers, lambda told: told.on_synced(self._group, report))
        return member.version

    def remove_engine(self, url: str) -> None:
        """Part with an engine, alive or not; it keeps serving what it has. Nobody else reconnects.

        Raises:
            ConfigError: it is no member.
        """
        if url not in self._members:
            raise ConfigError(f"engine {url} is no member. Members are {sorted(self._members)}.")
        with self._changing():
            self._part_with(self._members.pop(url))

    def verify(self, *, timeout_s: float = 600.0) -> VerifyReport:
        """Compare every byte of every tensor in every engine with the trainer's, by digests made in both.

        Called between an update and the trainer's next write. Nothing passes but digests; reads all weights
        once on each side, so it takes seconds for a billion parameters and holds generation meanwhile.

        Raises:
            EngineError, DeadlineError: a side does not answer.
            ReplicaMismatchError: two trainer ranks hold one region with different bytes.
            RdtError: a side cannot digest.
        """
        started, version = time.perf_counter(), self.version
        mismatched: list[str] = []
        unverified: set[str] = set()
        num_tensors = nbytes = 0
        answers = self._digest_engines(timeout_s)
        for url, answer in answers.items():
            held = add_digests(_region_digests(answer))
            dtypes = {d["tensor"]: d["dtype"] for rank in answer["ranks"] for d in rank["digests"]}
            trained = self._trainer_digests(dtypes, timeout_s)
            mismatched += [f"{url}: {name}" for name in sorted(held) if held[name] != trained.get(name)]
            mismatched += [f"{url}: {name}" for name, (_, _, agree) in sorted(held.items()) if not agree]
            unverified |= {name for rank in answer["ranks"] for name in rank["unverified"]}
            num_tensors = len(held)
            nbytes = sum(count * itemsize_bytes(dtypes[name]) for name, (_, count, _) in held.items())
        return VerifyReport(
            version=version,
            num_tensors=num_tensors,
            nbytes=nbytes,
            mismatched=tuple(dict.fromkeys(mismatched)),
            unverified=tuple(sorted(unverified)),
            seconds=time.perf_counter() - started,
        )

    def topology(self) -> str:
        """Names the trainer processes; another name when any was replaced. Asks the coordinator.

        Raises:
            SessionError, DeadlineError: it does not answer.
        """
        return self._client.topology()

    def status(self) -> dict[str, Any]:
        """Plain values about the group's trainers and engines."""
        return self._client.status()

    def close(self) -> None:
        """Disconnect every engine; they keep serving what they committed. Idempotent."""
        if not self._life.close():
            return
        for member in self._members.values():
            self._part_with(member)
        self._pool.shutdown(wait=False, cancel_futures=True)
        observer.tell(self._observers, lambda told: told.on_closed(self._group))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _update(self, members: Sequence[Member], version: int, options: UpdateOptions) -> SyncReport:
        self._life.move(SyncEvent.UPDATE)
        progress = Progress(version)
        try:
            with tracing.span("rdt.sync", group=self._group, version=version):
                report = self._run_phases(progress, members, options)
        except RdtError as error:
            failure = progress.failure(error)
            observer.tell(self._observers, lambda told: told.on_failed(self._group, failure))
            raise
        finally:
            # After Ctrl-C too, no engine may go on waiting for a commit.
            for member in members:
                member.retract("commit")
            self._life.end()
        observer.tell(self._observers, lambda told: told.on_synced(self._group, report))
        logger.info(
            "version %d: %d bytes, prepare %.3f s, commit %.3f s, stall %.3f s, %d engines failed",
            version,
            report.nbytes,
            report.prepare_s,
            report.commit_s,
            report.stall_s,
            len(report.failures),
        )
        return report

    def _run_phases(
        self, progress: Progress, members: Sequence[Member], options: UpdateOptions
    ) -> SyncReport:
        attempt = self._begin_round(members, progress.version, options)
        attempt.ask_ahead()
        try:
            with progress.enter("publish_wait"):
                life, progress.arena_bytes = self._client.wait_published(progress.version, options.timeout_s)
        except RdtError:
            attempt.give_up()
            raise
        self._life.move(SyncEvent.PUBLISHED)
        with progress.enter("prepare"):
            if options.mode is not None:
                self._asked["mode"] = options.mode
            attempt, ready = self._prepare(attempt, members, progress.version, options, life)
        self._life.move(SyncEvent.PREPARED)
        with progress.enter("commit"):
            answers = attempt.commit(ready)
        self._life.move(SyncEvent.DONE)
        return progress.report(answers, attempt.failures)

    def _prepare(
        self, attempt: Round, members: Sequence[Member], version: int, options: UpdateOptions, life: str
    ) -> tuple[Round, list[Member]]:
        """Have members read; once more if the coordinator is lost meanwhile: nothing has changed yet."""
        try:
            return attempt, attempt.prepare(life)
        except CoordinatorLostError as error:
            logger.info("version %d is read once more: %s", version, error.detail)
        # A coordinator that Ray restarted first hears from the trainer ranks what they hold.
        life, _ = self._client.wait_published(version, options.timeout_s)
        attempt = self._begin_round(members, version, options)
        return attempt, attempt.prepare(life)

    def _begin_round(self, members: Sequence[Member], version: int, options: UpdateOptions) -> Round:
        def connect(member: Member) -> None:
            # Generation there stands while it does.
            is_as_wanted = member.is_connected if options.mode is None else member.reads_in(options.mode)
            if not is_as_wanted:
                member.connect(self._asked, float(self._asked["timeout_s"]))

        # Who has missed a version may be gone: nobody waits for its share.
        staying = [
            member
            for member in members
            if member.is_connected
            and member.version == self._newest
            and (options.mode is None or member.reads_in(options.mode))
        ]
        circles = form_circles([place for member in staying for place in member.places])
        return Round(self._client, self._pool, members, version, options, connect, circles)

    def _part_with(self, member: Member) -> None:
        try:
            if member.may_be_connected:
                member.call("disconnect", {"group": self._group}, _TRAINERS_TIMEOUT_S)
        except RdtError as error:
            logger.debug("engine %s did not disconnect: %s", member.url, error)
        member.close()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change of members."""
        self._life.move(SyncEvent.JOIN)
        try:
            yield
        finally:
            self._life.end()

    def _on_all(self, act: Callable[[Member], None]) -> None:
        """Act on every engine at once; wait for all, then raise the first error."""
        futures = [self._pool.submit(act, member) for member in self._members.values()]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def _digest_engines(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = {}

        def digest(member: Member) -> None:
            answers[member.url] = member.call("digest", {}, timeout_s)

        self._on_all(digest)
        return answers

    def _trainer_digests(self, dtypes: dict[str, str], timeout_s: float) -> dict[str, tuple[int, int, bool]]:
        ranks = [int(rank) for rank in self._client.status()["trainers"]]
        answers = self._client.ask("digest", dict.fromkeys(ranks, dtypes), timeout_s)
        check_replicas(answers)
        return add_digests(digest for answer in answers.values() for digest in answer)


def _region_digests(answer: Mapping[str, Any]) -> list[RegionDigest]:
    return [
        RegionDigest(**{**digest, "start": tuple(digest["start"]), "stop": tuple(digest["stop"])})
        for rank in answer["ranks"]
        for digest in rank["digests"]
    ]
