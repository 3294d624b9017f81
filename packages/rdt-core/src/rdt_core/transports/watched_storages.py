"""Storages that exports offer where they lie, and a look at each a version: were they moved or freed?"""

from __future__ import annotations

import operator
import threading
from collections import Counter
from typing import TYPE_CHECKING

import torch

from rdt_core.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Iterable


class WatchedStorages:
    """Of all exports of one transport. Many readers read the same storages, which are looked at once.

    A storage that is resized lies elsewhere, or nowhere: its address tells. Every publish asks for thousands,
    between the optimizer's step and the engines, so no more is done than that takes. Methods may be called
    from any thread.
    """

    def __init__(self) -> None:
        self._num_holds: Counter[int] = Counter()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._checked: int | None = None
        self._lock = threading.Lock()

    def add(self, storages: Iterable[torch.UntypedStorage]) -> frozenset[int]:
        """Keep and watch them from now on; returns their addresses, for :meth:`remove`."""
        with self._lock:
            found = {storage.data_ptr(): storage for storage in storages}
            for address, storage in found.items():
                self._storages.setdefault(address, storage)
                self._num_holds[address] += 1
            return frozenset(found)

    def remove(self, addresses: frozenset[int]) -> None:
        """Take back one :meth:`add`."""
        with self._lock:
            for address in addresses:
                self._num_holds[address] -= 1
                if not self._num_holds[address]:
                    del self._num_holds[address], self._storages[address]

    def check(self, version: int) -> None:
        """Whether all are where they were; looks once a version.

        Raises:
            TransportError: one is not.
        """
        with self._lock:
            if version == self._checked:
                return
            addresses = [*self._storages]
            found = [*map(torch.UntypedStorage.data_ptr, self._storages.values())]
            if addresses != found:
                num_moved = sum(map(operator.ne, addresses, found))
                raise TransportError(
                    f"{num_moved} of {len(addresses)} storages that engines read by CUDA IPC were freed or "
                    f"resized before version {version}. Keep parameters where they were at attach, or attach "
                    "again."
                )
            self._checked = version
