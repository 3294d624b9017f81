"""Pair metadata that workers leave for each other: AReaL's ``/weight_meta`` store, with bounds."""

from __future__ import annotations

import json
import threading
from typing import Any

from rdt_core.gateway.errors import StoreFullError

MAX_PAIRS = 256
MAX_KEYS_PER_PAIR = 4096
MAX_SET_MEMBERS = 65_536


class MetaStore:
    """JSON values and sets of strings by pair and key. Every method may be called from any thread.

    Args:
        max_bytes: of all values together, in their JSON form.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._values: dict[str, dict[str, tuple[Any, int]]] = {}
        self._sets: dict[str, dict[str, set[str]]] = {}
        self._lock = threading.Lock()

    def get(self, pair: str, key: str) -> Any:
        """The value.

        Raises:
            KeyError: there is none.
        """
        with self._lock:
            return self._values[pair][key][0]

    def put(self, pair: str, key: str, value: Any) -> None:
        """Keep a value in place of what was there.

        Raises:
            StoreFullError: a bound is reached; what was there stays.
        """
        nbytes = len(json.dumps(value))
        with self._lock:
            known = self._values.get(pair, {})
            grown = self._nbytes + nbytes - known.get(key, (None, 0))[1]
            if grown > self._max_bytes:
                raise StoreFullError(f"{grown} of {self._max_bytes} bytes")
            self._check_room(pair, key)
            self._values.setdefault(pair, {})[key] = (value, nbytes)
            self._nbytes = grown

    def delete(self, pair: str, key: str) -> bool:
        """Forget a value; returns whether there was one."""
        with self._lock:
            _, nbytes = self._values.get(pair, {}).pop(key, (None, -1))
            self._nbytes -= max(nbytes, 0)
            return nbytes >= 0

    def add(self, pair: str, key: str, member: str) -> None:
        """Add to a set.

        Raises:
            StoreFullError: a bound is reached.
        """
        with self._lock:
            members = self._sets.get(pair, {}).get(key, set())
            if member in members:
                return
            if len(members) >= MAX_SET_MEMBERS:
                raise StoreFullError(f"{MAX_SET_MEMBERS} members in set {key!r}")
            if self._nbytes + len(member) > self._max_bytes:
                raise StoreFullError(f"{self._nbytes} of {self._max_bytes} bytes")
            self._check_room(pair, key)
            self._sets.setdefault(pair, {}).setdefault(key, set()).add(member)
            self._nbytes += len(member)

    def size(self, pair: str, key: str) -> int:
        """Members of a set; 0 when there is none."""
        with self._lock:
            return len(self._sets.get(pair, {}).get(key, ()))

    def clear(self, pair: str) -> None:
        """Forget all of a pair."""
        with self._lock:
            for _, nbytes in self._values.pop(pair, {}).values():
                self._nbytes -= nbytes
            for members in self._sets.pop(pair, {}).values():
                self._nbytes -= sum(map(len, members))

    def _check_room(self, pair: str, key: str) -> None:
        pairs = self._values.keys() | self._sets.keys()
        if pair not in pairs and len(pairs) >= MAX_PAIRS:
            raise StoreFullError(f"{MAX_PAIRS} pairs")
        keys = self._values.get(pair, {}).keys() | self._sets.get(pair, {}).keys()
        if key not in keys and len(keys) >= MAX_KEYS_PER_PAIR:
            raise StoreFullError(f"{MAX_KEYS_PER_PAIR} keys of pair {pair!r}")
