from __future__ import annotations

import pytest

from rdt_core.errors import ConfigError
from rdt_core.mode import AUTO, INPLACE, PINNED, RESERVE_BYTES, STAGED, choose_mode


@pytest.mark.parametrize(
    ("free_nbytes", "chosen"),
    [(100 + RESERVE_BYTES, STAGED), (99 + RESERVE_BYTES, INPLACE), (0, INPLACE), (None, STAGED)],
)
def test_staged_is_taken_when_its_landing_memory_and_the_reserve_fit(
    free_nbytes: int | None, chosen: str
) -> None:
    assert choose_mode(AUTO, landing_nbytes=100, free_nbytes=free_nbytes) == chosen


@pytest.mark.parametrize(
    ("host_nbytes", "chosen"), [(100 + RESERVE_BYTES, PINNED), (99 + RESERVE_BYTES, INPLACE), (None, INPLACE)]
)
def test_the_hosts_memory_is_taken_when_the_devices_is_full(host_nbytes: int | None, chosen: str) -> None:
    assert choose_mode(AUTO, landing_nbytes=100, free_nbytes=0, host_nbytes=host_nbytes) == chosen


@pytest.mark.parametrize("wanted", [STAGED, PINNED, INPLACE])
def test_a_mode_that_was_asked_for_is_not_overruled(wanted: str) -> None:
    for free_nbytes in (0, 10**15):
        assert choose_mode(wanted, landing_nbytes=10**12, free_nbytes=free_nbytes) == wanted


@pytest.mark.parametrize("wanted", ["", "Staged", "disk"])
def test_an_unknown_mode_is_refused_with_the_known_ones(wanted: str) -> None:
    with pytest.raises(ConfigError, match="auto, staged, pinned, inplace"):
        choose_mode(wanted, landing_nbytes=1, free_nbytes=1)
