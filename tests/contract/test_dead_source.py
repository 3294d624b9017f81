"""A NIXL source that dies or stands still while it is read."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest
import torch

from rdt_core.errors import PullTimeoutError, RdtError, SourceDiedError
from rdt_core.transports import make_transport
from tests.contract.sources import ActorSource
from tests.local_group import wait_for

TIMEOUT_S = 60.0
NBYTES = 400 * 2**20


class Pull:
    """A pull in a thread of its own, seen to have brought its first byte."""

    def __init__(self, source: ActorSource) -> None:
        self.target = torch.full((NBYTES,), 255, dtype=torch.uint8)
        self.link = make_transport("nixl").open(source.export(), [self.target], trainer_rank=3)
        self.error: RdtError | None = None
        self._thread = threading.Thread(target=self._pull, daemon=True)
        self._thread.start()
        wait_for(lambda: int(self.target[0]) == 0)

    def _pull(self) -> None:
        try:
            self.link.pull(0, timeout_s=TIMEOUT_S)
        except RdtError as error:
            self.error = error

    def join(self) -> None:
        """Until the pull has ended, which it must."""
        self._thread.join(2 * TIMEOUT_S)
        assert not self._thread.is_alive()


@pytest.fixture
def source(ray_cluster: str) -> ActorSource:
    assert ray_cluster
    return ActorSource("nixl", (NBYTES,))


def test_a_source_killed_in_mid_pull_ends_the_pull_with_an_error_or_with_every_byte(
    source: ActorSource,
) -> None:
    pull = Pull(source)
    source.kill()
    pull.join()
    # Which of the two depends on how far it was; a pull that says it is done has brought everything.
    assert isinstance(pull.error, SourceDiedError) if pull.error else not pull.target.any()
    with pytest.raises(SourceDiedError, match="trainer rank 3"):
        pull.link.pull(0, timeout_s=TIMEOUT_S)
    pull.link.close()


def test_a_source_that_stands_still_ends_the_pull_in_time_and_is_read_when_it_goes_on(
    source: ActorSource,
) -> None:
    pull = Pull(source)
    pull.join()
    os.kill(source.pid, signal.SIGSTOP)
    try:
        # On one host the kernel may copy from a stopped process, so this may also succeed.
        with contextlib.suppress(PullTimeoutError):
            pull.link.pull(0, timeout_s=2.0)
    finally:
        os.kill(source.pid, signal.SIGCONT)
    pull.target.fill_(255)
    pull.link.pull(0, timeout_s=TIMEOUT_S)
    assert not pull.target.any()
    pull.link.close()
    source.kill()


def test_rays_own_limit_is_a_time_that_passed_and_not_a_source_that_died(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray_cluster
    source = ActorSource("nixl", (4096,))
    target = torch.full((4096,), 255, dtype=torch.uint8)
    link = make_transport("nixl").open(source.export(), [target], trainer_rank=3)
    with monkeypatch.context() as patch:
        # What RAY_rdt_fetch_fail_timeout_milliseconds sets, read when ray is imported; past at once.
        patch.setattr("ray._private.ray_constants.RDT_FETCH_FAIL_TIMEOUT_SECONDS", -1.0)
        with pytest.raises(PullTimeoutError, match="trainer rank 3 did not end within"):
            link.pull(0, timeout_s=TIMEOUT_S)
    link.pull(0, timeout_s=TIMEOUT_S)
    assert not target.any()
    link.close()
    source.kill()
