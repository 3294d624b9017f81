"""Continuous load on one place of a group: whatever engine stands there is asked without a pause."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import httpx

from tests.chaos.verdict import Answer

if TYPE_CHECKING:
    from tests.chaos.engines import EngineProcess

_PAUSE_S = 0.05


class Load(threading.Thread):
    """Asks one engine after the other's answer is there, until stopped.

    Args:
        name: of the place.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=f"load-{name}", daemon=True)
        self._place, self._life = name, 0
        self._engine: EngineProcess | None = None
        self._is_over = threading.Event()
        self.answers: list[Answer] = []
        self.num_refused = self.num_broken = self.num_aborted = 0
        self.hung_s: list[float] = []
        self.error: Exception | None = None
        self.start()

    def aim(self, engine: EngineProcess | None) -> None:
        """From now on ask this engine, a new life; nobody if None."""
        self._life += 1
        self._engine = engine

    def run(self) -> None:
        while not self._is_over.wait(_PAUSE_S):
            engine, life = self._engine, f"{self._place} life {self._life}"
            if engine is None:
                continue
            try:
                self._ask(engine, life)
            except Exception as error:  # noqa: BLE001  an answer that is none of those we know fails the run
                self.error = error
                return

    def _ask(self, engine: EngineProcess, life: str) -> None:
        started_s = time.monotonic()
        try:
            said = engine.ask()
        except httpx.TimeoutException:
            self.hung_s.append(started_s)
        except httpx.HTTPError:
            self.num_broken += 1
        else:
            if said is None:
                self.num_refused += 1
            elif not said.tokens:
                # An engine whose commit failed in place aborts what is in flight: nothing was said.
                self.num_aborted += 1
            else:
                self.answers.append(
                    Answer(
                        engine=life,
                        started_s=started_s,
                        ended_s=time.monotonic(),
                        tokens=said.tokens,
                        versions=said.versions,
                    )
                )

    def stop(self) -> None:
        """Ask no more."""
        self._is_over.set()
