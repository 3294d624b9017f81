"""What crosses SGLang's message queue between a server's front and its schedulers.

The class names are the tags on SGLang's wire. Contents are JSON: answers hold digests that are larger than
the integers of msgpack.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import BaseReq

if TYPE_CHECKING:
    from collections.abc import Sequence


class WeightSyncReqInput(BaseReq, kw_only=True):  # type: ignore[call-arg]  # msgspec's
    """A control request to every scheduler rank; see :class:`rdt_sglang.engine.SchedulerReceiver`."""

    method: str
    content: str

    @classmethod
    def make(cls, method: str, payload: dict[str, Any]) -> WeightSyncReqInput:
        """A request to run a method with the given arguments."""
        return cls(method=method, content=json.dumps(payload))

    @property
    def payload(self) -> dict[str, Any]:
        """The method's arguments."""
        return dict(json.loads(self.content))


class WeightSyncReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg]  # msgspec's
    """The answers of all ranks of one scheduler group."""

    content: str

    @classmethod
    def make(cls, answers: Sequence[dict[str, Any]]) -> WeightSyncReqOutput:
        """An answer that holds every rank's."""
        return cls(content=json.dumps(list(answers)))

    @property
    def answers(self) -> list[dict[str, Any]]:
        """One answer a rank, with its ``rank``, ``ok``, and ``result`` or ``error``."""
        return list(json.loads(self.content))
