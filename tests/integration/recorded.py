"""Records a loader, replays what it did, and compares every byte with the loader's own work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rdt_core.manifest import Manifest, Window, find_fault
from rdt_core.recorder import record_loader
from tests.integration.loader_models import picture, pour, replay, specs_of

if TYPE_CHECKING:
    from rdt_core.recording import Recording
    from tests.integration.loader_models import Model


def record_and_compare(model: Model, reference: Model, tensors: dict[str, torch.Tensor]) -> Recording:
    """Record on a model full of a pattern, replay, and compare with the loader's own work on its twin."""
    pour(model)
    pour(reference)
    before = picture(model)
    recording = record_loader(model, specs_of(tensors))
    assert picture(model) == before
    assert find_fault(as_manifest(recording, tensors)) is None
    replay(recording, tensors, model.load_weights)
    with torch.no_grad():
        reference.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
    assert picture(model) == picture(reference)
    return recording


def as_manifest(recording: Recording, tensors: dict[str, torch.Tensor]) -> Manifest:
    return Manifest(
        side="engine",
        rank=0,
        world_size=1,
        node="here",
        device="cpu",
        windows={name: Window(name, flat.numel()) for name, flat in recording.windows.items()},
        tensors={spec.name: spec for spec in specs_of(tensors)},
        shards=recording.shards,
    )
