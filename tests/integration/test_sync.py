"""From two trainer ranks into a live engine process over Ray NIXL, and every way to get it wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import ray
import torch

from rdt_core import WeightSync
from rdt_core.errors import (
    ConfigError,
    EngineRefusedError,
    EngineUnreachableError,
    GroupInUseError,
    InvalidVersionError,
    MissingTrainerRankError,
    ModelMismatchError,
    NotPublishedError,
    PlanError,
    RdtError,
    StaleVersionError,
    UnknownGroupError,
    UpdateFailedError,
    WindowMovedError,
)
from tests.contract.world import expected_fingerprint
from tests.integration.toy_trainer import HIDDEN, SHAPES, kill_process, start_trainers, values_of
from tests.published import wait_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TIMEOUT_S = 120.0
BAD_INPUT_DEADLINE_S = 10.0


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=TIMEOUT_S)


def fingerprint(url: str) -> dict[str, str]:
    return dict(httpx.get(f"{url}/fingerprint", timeout=TIMEOUT_S).json())


@dataclass
class Trainers:
    """Attached trainer ranks."""

    group: str
    ranks: list[Any]
    pids: list[int]

    def write_and_publish(self, version: int) -> None:
        get([rank.write.remote(version) for rank in self.ranks])
        get([rank.publish.remote(version) for rank in self.ranks])


@pytest.fixture(scope="module")
def shared_ranks(ray_cluster: str) -> Iterator[list[Any]]:
    """Two rank processes that hold the toy model in fp32, for every test that leaves them alive."""
    assert ray_cluster
    ranks = start_trainers(2)
    yield ranks
    for rank in ranks:
        ray.kill(rank)


@pytest.fixture
def trainers(shared_ranks: list[Any], group: str) -> Iterator[Trainers]:
    """The shared ranks, attached under a group of this test's own."""
    yield Trainers(group, shared_ranks, get([rank.attach.remote(group) for rank in shared_ranks]))
    get([rank.close.remote() for rank in shared_ranks])


@pytest.fixture
def mortal_trainers(ray_cluster: str, group: str) -> Iterator[Trainers]:
    """Two attached rank processes of this test's own, which it may kill or spoil."""
    assert ray_cluster
    ranks, group = start_trainers(2), f"mortal-{group}"
    yield Trainers(group, ranks, get([rank.attach.remote(group) for rank in ranks]))
    for rank in ranks:
        ray.kill(rank)


@pytest.fixture(scope="module")
def engine(start_toy_engine: Callable[..., str]) -> str:
    """An fp32 toy engine, used by many tests one after another."""
    return start_toy_engine()


def test_every_version_lands_whole_and_the_report_counts_its_bytes(trainers: Trainers, engine: str) -> None:
    with WeightSync.connect(trainers.group, engines=[engine]) as sync:
        for version in (1, 2, 5):
            trainers.write_and_publish(version)
            report = sync.update(version=version)
            assert fingerprint(engine) == expected_fingerprint(version)
            assert report.version == sync.version == version
            assert report.num_tensors == len(SHAPES)
            assert report.nbytes == 4 * (100 * HIDDEN + 3 * HIDDEN * HIDDEN + HIDDEN)
            assert 0 < report.commit_s <= report.stall_s <= report.total_s
            verified = sync.verify()
            assert verified.bytes_equal
            assert verified.nbytes == report.nbytes
            status = httpx.get(f"{engine}/rdt/status", timeout=TIMEOUT_S).json()
            assert (status["group"], status["version"]) == (trainers.group, version)
            assert status["last_sync"]["ranks"] == json.loads(json.dumps(report.as_dict()["ranks"]))


def test_in_place_versions_land_in_the_parameters_themselves(trainers: Trainers, engine: str) -> None:
    with WeightSync.connect(trainers.group, engines=[engine], mode="inplace") as sync:
        (rank,) = sync.engines[engine]
        assert (rank["mode"], rank["landing_nbytes"]) == ("inplace", 0)
        for version, mode in ((1, None), (2, "staged"), (3, "inplace")):
            trainers.write_and_publish(version)
            report = sync.update(version=version, mode=mode)
            assert fingerprint(engine) == expected_fingerprint(version)
            assert report.ranks[0].mode == mode or "inplace"
            assert (report.ranks[0].prepare_s > 0) == (mode == "staged")


def test_an_engine_whose_trainer_dies_before_an_in_place_read_refuses_to_answer_until_it_is_repaired(
    mortal_trainers: Trainers, trainers: Trainers, engine: str
) -> None:
    with WeightSync.connect(mortal_trainers.group, engines=[engine], mode="inplace") as sync:
        mortal_trainers.write_and_publish(1)
        kill_process(mortal_trainers.pids[1])
        with pytest.raises(UpdateFailedError, match=r"in commit .* trainer rank 1"):
            sync.update(version=1)
    refusal = httpx.get(f"{engine}/fingerprint", timeout=TIMEOUT_S)
    assert refusal.status_code == 503
    assert refusal.json()["error"]["type"] == "EngineTornError"
    with WeightSync.connect(trainers.group, engines=[engine]) as sync:
        trainers.write_and_publish(1)
        sync.update(version=1)
        assert fingerprint(engine) == expected_fingerprint(1)


def test_verify_names_the_tensor_whose_bytes_differ(trainers: Trainers, engine: str) -> None:
    with WeightSync.connect(trainers.group, engines=[engine]) as sync:
        trainers.write_and_publish(1)
        sync.update(version=1)
        get(trainers.ranks[1].write.remote(2))
        report = sync.verify()
        assert not report.bytes_equal
        assert len(report.mismatched) == len(SHAPES)
        assert f"{engine}: k.weight" in report.mismatched


def test_two_engines_of_different_dtype_follow_one_publish(
    trainers: Trainers, engine: str, start_toy_engine: Callable[..., str]
) -> None:
    narrow = start_toy_engine("--dtype", "bfloat16")
    with WeightSync.connect(trainers.group, engines=[engine, narrow]) as sync:
        for version in (1, 2):
            trainers.write_and_publish(version)
            report = sync.update(version=version)
            assert fingerprint(engine) == expected_fingerprint(version)
            assert fingerprint(narrow) == expected_fingerprint(version, torch.bfloat16)
            assert sync.verify().bytes_equal
            # The bf16 engine alone reads arenas, and half of the bytes.
            wide, thin = (next(row for row in report.ranks if row.engine == url) for url in (engine, narrow))
            assert report.arena_bytes == thin.nbytes == wide.nbytes // 2


def test_bf16_trainers_are_widened_for_an_fp32_engine(ray_cluster: str, group: str, engine: str) -> None:
    assert ray_cluster
    ranks = start_trainers(2, dtype="bfloat16")
    get([rank.attach.remote(group) for rank in ranks])
    trainers = Trainers(group, ranks, [])
    with WeightSync.connect(group, engines=[engine]) as sync:
        trainers.write_and_publish(1)
        sync.update(version=1)
        assert sync.verify().bytes_equal
    wanted = values_of("norm.weight", (HIDDEN,), 1, torch.bfloat16).float()
    assert fingerprint(engine)["norm"] == hashlib.sha256(wanted.numpy().tobytes()).hexdigest()


def test_an_engine_behind_a_key_is_reached_with_it_and_refuses_without(
    trainers: Trainers, start_toy_engine: Callable[..., str]
) -> None:
    guarded = start_toy_engine("--api-key", "k1", "--api-key", "k2")
    for key in (None, "wrong"):
        with pytest.raises(EngineRefusedError, match="401") as caught:
            WeightSync.connect(trainers.group, engines=[guarded], api_key=key)
        assert "wrong" not in str(caught.value)
    with WeightSync.connect(trainers.group, engines=[guarded], api_key="k2") as sync:
        trainers.write_and_publish(1)
        assert sync.update(version=1).version == 1


def test_a_trainer_rank_killed_before_the_read_leaves_the_old_version_serving(
    mortal_trainers: Trainers, engine: str
) -> None:
    trainers = mortal_trainers
    with WeightSync.connect(trainers.group, engines=[engine]) as sync:
        trainers.write_and_publish(1)
        sync.update(version=1)
        trainers.write_and_publish(2)
        wait_known(sync, 2)
        kill_process(trainers.pids[1])
        with pytest.raises(UpdateFailedError, match="trainer rank 1"):
            sync.update(version=2)
        assert fingerprint(engine) == expected_fingerprint(1)


def test_a_trainer_rank_that_stands_still_fails_the_sync_in_time_and_the_next_one_works(
    mortal_trainers: Trainers, engine: str
) -> None:
    trainers = mortal_trainers
    with WeightSync.connect(trainers.group, engines=[engine]) as sync:
        trainers.write_and_publish(1)
        sync.update(version=1)
        trainers.write_and_publish(2)
        os.kill(trainers.pids[1], signal.SIGSTOP)
        try:
            started = time.monotonic()
            # On one host the kernel may copy from a stopped process; then the sync is done, and right.
            with contextlib.suppress(RdtError):
                sync.update(version=2, timeout_s=5.0)
            assert time.monotonic() - started < 60
            assert fingerprint(engine) == expected_fingerprint(sync.version)
        finally:
            os.kill(trainers.pids[1], signal.SIGCONT)
        trainers.write_and_publish(3)
        sync.update(version=3)
        assert fingerprint(engine) == expected_fingerprint(3)


def test_a_failed_sync_costs_the_next_group_nothing(
    mortal_trainers: Trainers, trainers: Trainers, engine: str
) -> None:
    sync = WeightSync.connect(mortal_trainers.group, engines=[engine])
    mortal_trainers.write_and_publish(1)
    wait_known(sync, 1)
    kill_process(mortal_trainers.pids[0])
    with pytest.raises(UpdateFailedError):
        sync.update(version=1)
    sync.close()
    with WeightSync.connect(trainers.group, engines=[engine]) as sync:
        trainers.write_and_publish(1)
        sync.update(version=1)
        assert fingerprint(engine) == expected_fingerprint(1)


def test_publishing_again_while_a_version_is_read_is_an_error_not_a_mix(
    trainers: Trainers, engine: str
) -> None:
    with WeightSync.connect(trainers.group, engines=[engine]) as sync:
        trainers.write_and_publish(1)
        sync.update(version=1)
        trainers.write_and_publish(2)
        trainers.write_and_publish(3)
        with pytest.raises(RdtError, match="replaced by 3"):
            sync.update(version=2)
        assert fingerprint(engine) == expected_fingerprint(1)
        sync.update(version=3)
        assert fingerprint(engine) == expected_fingerprint(3)


def test_memory_that_moved_since_attach_is_refused_at_publish(mortal_trainers: Trainers) -> None:
    trainers = mortal_trainers
    get(trainers.ranks[0].publish.remote(1))
    get(trainers.ranks[0].move_memory.remote())
    with pytest.raises(WindowMovedError, match=r"embed\.weight"):
        get(trainers.ranks[0].publish.remote(2))


@dataclass
class Refusal:
    """Checks that bad input is refused in time and changes nothing in the engine."""

    engine: str

    def __enter__(self) -> None:
        self._before, self._started = fingerprint(self.engine), time.monotonic()

    def __exit__(self, *_: object) -> None:
        assert time.monotonic() - self._started < BAD_INPUT_DEADLINE_S
        assert fingerprint(self.engine) == self._before


def test_an_unknown_group_is_refused(ray_cluster: str, engine: str) -> None:
    assert ray_cluster
    with Refusal(engine), pytest.raises(UnknownGroupError, match="nobody"):
        WeightSync.connect("nobody", engines=[engine])


def test_a_missing_trainer_rank_is_refused_by_number(ray_cluster: str, group: str, engine: str) -> None:
    assert ray_cluster
    ranks = start_trainers(2)
    get(ranks[0].attach.remote(group))
    with Refusal(engine), pytest.raises(MissingTrainerRankError) as caught:
        WeightSync.connect(group, engines=[engine])
    assert caught.value.missing == (1,)


def test_a_second_publisher_under_one_name_is_refused(trainers: Trainers, engine: str) -> None:
    second = start_trainers(2)
    get(second[0].__ray_ready__.remote())
    with Refusal(engine), pytest.raises(GroupInUseError):
        get(second[0].attach.remote(trainers.group))


def test_an_engine_without_the_flag_is_refused(
    trainers: Trainers, start_toy_engine: Callable[..., str]
) -> None:
    plain = start_toy_engine("--without-weight-sync")
    with Refusal(plain), pytest.raises(EngineRefusedError, match="--weight-sync rdt"):
        WeightSync.connect(trainers.group, engines=[plain])


def test_an_address_where_nothing_listens_is_refused(trainers: Trainers, engine: str) -> None:
    with Refusal(engine), pytest.raises(EngineUnreachableError):
        WeightSync.connect(trainers.group, engines=["http://127.0.0.1:9"])


def test_one_engine_that_fails_to_connect_leaves_none_connected(trainers: Trainers, engine: str) -> None:
    with Refusal(engine), pytest.raises(EngineUnreachableError):
        WeightSync.connect(trainers.group, engines=[engine, "http://127.0.0.1:9"])
    assert httpx.get(f"{engine}/rdt/status", timeout=TIMEOUT_S).json()["ranks"][0]["group"] is None


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({**SHAPES, "q.weight": (HIDDEN, HIDDEN + 2)}, "q.weight"),
        ({**SHAPES, "embed.weight": (101, HIDDEN)}, "embed.weight"),
        ({**SHAPES, "other.weight": (HIDDEN,)}, "other.weight"),
        ({name: shape for name, shape in SHAPES.items() if name != "v.weight"}, "qkv"),
    ],
    ids=["another shape", "another vocabulary", "another name", "one tensor fewer"],
)
def test_another_model_is_refused_with_the_tensor_that_differs(
    ray_cluster: str, group: str, engine: str, shapes: dict[str, tuple[int, ...]], named: str
) -> None:
    assert ray_cluster
    ranks = start_trainers(2, shapes=shapes)
    get([rank.attach.remote(group) for rank in ranks])
    with Refusal(engine), pytest.raises((ModelMismatchError, PlanError), match=named):
        WeightSync.connect(group, engines=[engine])


def test_versions_that_do_not_grow_or_are_no_versions_are_refused(trainers: Trainers, engine: str) -> None:
    with WeightSync.connect(trainers.group, engines=[engine]) as sync:
        trainers.write_and_publish(3)
        sync.update(version=3)
        with Refusal(engine):
            with pytest.raises(StaleVersionError):
                sync.update(version=3)
            with pytest.raises(InvalidVersionError):
                sync.update(version=0)
            with pytest.raises(StaleVersionError):
                get(trainers.ranks[0].publish.remote(3))
            with pytest.raises(InvalidVersionError):
                get(trainers.ranks[0].publish.remote(-1))


def test_a_version_that_is_not_published_is_refused_with_the_late_ranks(
    trainers: Trainers, engine: str
) -> None:
    with WeightSync.connect(trainers.group, engines=[engine]) as sync:
        get(trainers.ranks[0].publish.remote(1))
        with Refusal(engine), pytest.raises(NotPublishedError) as caught:
            sync.update(version=1, timeout_s=1.0)
        assert caught.value.missing == (1,)


def test_a_transport_that_does_not_exist_is_refused(trainers: Trainers, engine: str) -> None:
    with Refusal(engine), pytest.raises(RdtError, match="pigeon"):
        WeightSync.connect(trainers.group, engines=[engine], transport="pigeon")


def test_a_list_of_engines_that_is_empty_or_names_one_twice_is_refused(
    trainers: Trainers, engine: str
) -> None:
    for engines in ([], [engine, engine]):
        with Refusal(engine), pytest.raises(ConfigError):
            WeightSync.connect(trainers.group, engines=engines)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"not json",
        b'{"version": "1"}',
        b'{"version": true}',
        b'{"version": 1, "timeout_s": -1}',
        b"{}",
    ],
)
def test_a_malformed_control_request_is_a_4xx_with_a_sentence(engine: str, body: bytes) -> None:
    with Refusal(engine):
        response = httpx.post(f"{engine}/rdt/prepare", content=body, timeout=TIMEOUT_S)
    assert response.status_code in (400, 409)
    assert response.json()


def test_an_oversized_control_request_is_refused(engine: str) -> None:
    with Refusal(engine):
        response = httpx.post(f"{engine}/rdt/prepare", content=b"x" * 2**20, timeout=TIMEOUT_S)
    assert response.status_code == 413


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a process that has not joined Ray."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**plain, **env},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


CONNECT = """
    import time
    import ray, torch
    from rdt_core import WeightSync
    started = time.monotonic()
    try:
        WeightSync.connect("policy", engines=["http://127.0.0.1:9"])
    except Exception as error:
        print(type(error).__name__, error)
        assert time.monotonic() - started < 10
"""


def test_a_cluster_that_is_not_there_is_reported_in_time() -> None:
    done = run_python(CONNECT, RAY_ADDRESS="127.0.0.1:9")
    assert done.stdout.startswith("NoRayClusterError"), done.stderr
    assert "ray start" in done.stdout


def test_a_wrong_token_is_reported_with_what_to_set(ray_cluster: str, tmp_path: Path) -> None:
    token = tmp_path / "wrong"
    token.write_text("0" * 64)
    done = run_python(CONNECT, RAY_ADDRESS=ray_cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    assert done.stdout.startswith("RayAuthError"), done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stdout
    assert "0000" not in done.stdout + done.stderr


def test_a_token_file_that_is_not_there_is_reported_and_does_not_abort(
    ray_cluster: str, tmp_path: Path
) -> None:
    done = run_python(
        CONNECT, RAY_ADDRESS=ray_cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "none")
    )
    assert done.returncode == 0
    assert done.stdout.startswith("RayAuthError"), done.stderr


def test_a_missing_nixl_is_reported_with_the_command_that_installs_it() -> None:
    done = run_python(
        """
        import sys

        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name == "nixl" or name.startswith("nixl."):
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Hide())
        from rdt_core.transports import make_transport
        try:
            make_transport("nixl")
        except Exception as error:
            print(type(error).__name__, error)
        """
    )
    assert done.stdout.startswith("TransportUnavailableError"), done.stderr
    assert "pip install" in done.stdout
