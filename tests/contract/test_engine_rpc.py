"""The border between an engine's control plane and its subscribers: whatever is raised, it answers."""

from __future__ import annotations

import torch

from rdt_core import engine_rpc
from rdt_core.subscriber import WeightSubscriber
from tests.integration.toy_engine import ToyEngineModel, ToyModel


class BackendError(Exception):
    """Of no kind that Python has: nixl's errors are like that."""


class BrokenSubscriber(WeightSubscriber):
    def abort(self) -> None:
        raise BackendError("no such device")


def test_an_error_of_a_library_reaches_the_driver_with_its_name_and_does_not_end_the_worker() -> None:
    subscriber = BrokenSubscriber(ToyEngineModel(ToyModel(100, torch.float32)))
    answer = engine_rpc.call(subscriber, "abort", {})
    assert not answer["ok"]
    assert "abort failed: BackendError: no such device" in answer["error"]["message"]
    assert engine_rpc.call(subscriber, "status", {})["ok"]
