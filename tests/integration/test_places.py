"""Memory that moved is noticed whichever way it moved, and what did not move is where it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from rdt_megatron import fsdp_shards
from rdt_megatron.places import Places, Slot

if TYPE_CHECKING:
    from collections.abc import Callable


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def last_layer(model: nn.Sequential) -> nn.Linear:
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    return layer


def repoint(model: nn.Sequential) -> None:
    weight = last_layer(model).weight
    weight.data = weight.data.clone()


def replace_the_parameter(model: nn.Sequential) -> None:
    last_layer(model).weight = nn.Parameter(last_layer(model).weight.detach().clone())


def replace_what_the_module_holds(model: nn.Sequential) -> None:
    last_layer(model)._parameters.update(nn.Linear(3, 2)._parameters)


@pytest.mark.parametrize("move", [repoint, replace_the_parameter, replace_what_the_module_holds])
def test_a_parameter_that_moved_is_the_one_found_elsewhere(move: Callable[[nn.Sequential], None]) -> None:
    model = make_model()
    local = fsdp_shards(model)
    before = local.locate()
    owners = [shard.owner for shard in local.shards]

    kept = [parameter.detach() for parameter in model.parameters()]  # so that no address is used again
    move(model)

    now = dict(zip(owners, local.locate(), strict=True))
    assert now == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert now["1.weight"] not in before
    assert now["0.weight"] == before[0] == kept[0].data_ptr()


def test_a_step_in_place_moves_nothing() -> None:
    model = make_model()
    local = fsdp_shards(model)
    before = local.locate()

    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()

    assert local.locate() == before


def test_offsets_count_from_what_is_found_in_parameters_and_buffers() -> None:
    model = nn.BatchNorm1d(4)
    mean = model.running_mean
    assert mean is not None

    found = Places([(Slot(model, "weight", model.weight), 0), (Slot(model, "running_mean", mean), 8)])()

    assert found == (model.weight.data_ptr(), mean.data_ptr() + 8)


def test_a_source_that_no_module_holds_is_asked_for_its_tensor_every_time() -> None:
    tensors = [torch.zeros(4), torch.ones(4)]
    places = Places([(lambda: tensors[-1], 4)])
    assert places() == (tensors[1].data_ptr() + 4,)

    tensors.append(torch.zeros(8))

    assert places() == (tensors[2].data_ptr() + 4,)


def test_a_parameter_that_its_module_lost_is_nowhere() -> None:
    model = nn.Linear(4, 3)
    places = Places([(Slot(model, "weight", model.weight), 0), (Slot(model, "bias", model.bias), 0)])
    bias = model.bias.data_ptr()
    del model.weight

    assert places() == (0, bias)
