"""Memory that readers have mapped must not move; one look a version, however many readers there are."""

from __future__ import annotations

import pytest
import torch

from rdt_core.errors import TransportError
from rdt_core.transports.watched_storages import WatchedStorages


def storages(count: int) -> list[torch.UntypedStorage]:
    return [torch.zeros(64, dtype=torch.uint8).untyped_storage() for _ in range(count)]


@pytest.mark.parametrize("nbytes", [0, 1 << 20])
def test_what_is_freed_or_resized_is_refused_at_every_version_until_it_is_let_go(nbytes: int) -> None:
    watched, kept = WatchedStorages(), storages(3)
    first, second = watched.add(kept), watched.add(kept[1:])
    watched.check(1)
    kept[0].resize_(nbytes)
    for version in (2, 3):
        with pytest.raises(TransportError, match="1 of 3 storages"):
            watched.check(version)
    watched.remove(first)
    watched.check(4)
    kept[2].resize_(nbytes)
    with pytest.raises(TransportError, match="1 of 2 storages"):
        watched.check(5)
    watched.remove(second)
    watched.check(6)


def test_a_version_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedStorages()
    watched.add(storages(3))
    watched.check(1)
    monkeypatch.setattr(watched, "_storages", None)  # looking again would fail
    watched.check(1)
