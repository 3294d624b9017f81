"""What ranks do in the tests of the exporters for LoRA; each function runs in every rank."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rdt_core.errors import UnsupportedLayoutError
from rdt_megatron import adapter_shards, fsdp_shards, merged_shards
from rdt_megatron.names import strip_wrappers
from tests.integration.flat_cases import wrap_flat
from tests.integration.sharded_net import check, make_net, shard_fully, slice_of, train

if TYPE_CHECKING:
    from collections.abc import Callable

    from rdt_core.local_shards import LocalShards


def _lora(**options: Any) -> Any:
    """The net with two adapters of other ranks than one, one saved module, and factors that are not zero."""
    torch.manual_seed(2)
    config: dict[str, Any] = {"target_modules": ["up", "down", "embed"], "r": 3, "lora_alpha": 5, **options}
    model: Any = get_peft_model(make_net(), LoraConfig(**config, modules_to_save=["head"]))
    model.add_adapter("other", LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return model


def _shard(model: Any) -> Any:
    return shard_fully(model, model.base_model.model.blocks)


def _saved(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """What PEFT itself puts into an adapter's checkpoint, gathered."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in saved.items()}


def _check_adapter(
    model: Any, saved: Callable[[], dict[str, torch.Tensor]], adapter: str = "default"
) -> list[str]:
    """As PEFT saves it, before and after three steps with the description of the start."""
    local = adapter_shards(model, adapter=adapter)
    check(local, saved())
    before, addresses = [shard.data.clone() for shard in local.shards], local.locate()
    train(model, 3)
    assert local.locate() == addresses
    check(local, saved())
    is_same = [torch.equal(a, s.data) for a, s in zip(before, local.shards, strict=True)]
    assert not any(is_same) or adapter != "default"
    return sorted(_saved_names(local))


def _saved_names(local: LocalShards) -> set[str]:
    return {shard.spec.name for shard in local.shards}


def adapter_in_one_process() -> list[str]:
    model = _lora()
    return _check_adapter(model, lambda: _saved(model))


def adapter_that_is_not_active() -> list[str]:
    model = _lora()
    return _check_adapter(model, lambda: _saved(model, "other"), "other")


def adapter_of_weight_decomposition() -> list[str]:
    model = _lora(use_dora=True, target_modules=["up", "down"])
    return _check_adapter(model, lambda: _saved(model))


def adapter_under_fsdp2() -> list[str]:
    model = _shard(_lora())
    return _check_adapter(model, lambda: _saved(model))


def adapter_under_ddp() -> list[str]:
    model = DistributedDataParallel(_lora(target_modules=["up", "down"], lora_bias=True))
    return _check_adapter(model, lambda: _saved(model.module))


def adapter_under_fsdp1() -> list[str]:
    model = wrap_flat(_lora())

    def saved() -> dict[str, torch.Tensor]:
        whole = _lora()
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            state = {strip_wrappers(name): p for name, p in model.named_parameters()}
            whole.load_state_dict(state, strict=False)
        return _saved(whole)

    return _check_adapter(model, saved)


def merged_in_one_process() -> int:
    return _check_merged(_lora())


def merged_under_fsdp2() -> int:
    return _check_merged(_shard(_lora()))


def _check_merged(model: Any) -> int:
    """As PEFT merges a whole copy of the model, before and after three steps; base weights do not change."""
    local = merged_shards(model)
    base = _gathered(model, "base_layer")
    assert local.refresh is not None
    for num_steps in (0, 3):
        train(model, num_steps)
        local.refresh()
        merged = _merge_a_copy(model)
        for shard in local.shards:
            expected = slice_of(merged[shard.spec.name], shard.region)
            torch.testing.assert_close(shard.data, expected, rtol=1e-6, atol=1e-6)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, _saved_names(local))
        assert set().union(*everywhere) == set(merged) - {"counter"}
    for name, weight in _gathered(model, "base_layer").items():
        assert torch.equal(weight, base[name]), name
    return local.copied_bytes


def _gathered(model: Any, part: str = "") -> dict[str, torch.Tensor]:
    state = {name: value for name, value in model.state_dict().items() if part in name}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}


def _merge_a_copy(model: Any) -> dict[str, torch.Tensor]:
    whole = _lora()
    whole.load_state_dict(_gathered(model))
    merged: dict[str, torch.Tensor] = whole.merge_and_unload().state_dict()
    return merged


def merged_after_an_evaluation() -> None:
    """FSDP leaves the root gathered then; the copies are filled all the same, and training goes on."""
    model = _shard(_lora())
    local = merged_shards(model)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    assert local.refresh is not None
    local.refresh()
    train(model, 1)
    _check_merged(model)


def _refusal(export: Callable[[], LocalShards]) -> list[str]:
    try:
        local = export()
        with contextlib.suppress(TypeError):
            local.refresh()  # type: ignore[misc]  # some refuse at the first publish only
    except UnsupportedLayoutError as error:
        return [error.tensor, error.reason, error.remedy]
    raise AssertionError("it was exported")


def refuses_the_sum() -> list[str]:
    return _refusal(lambda: fsdp_shards(_shard(_lora())))


def refuses_an_unknown_adapter() -> list[str]:
    return _refusal(lambda: adapter_shards(_lora(), adapter="missing"))


def refuses_a_model_without_adapters() -> list[str]:
    return _refusal(lambda: adapter_shards(make_net()))


def refuses_other_kinds() -> list[str]:
    config = IA3Config(target_modules=["up"], feedforward_modules=["up"])
    return _refusal(lambda: adapter_shards(get_peft_model(make_net(), config)))


def refuses_what_is_trained_besides() -> list[str]:
    model = _lora()
    model.base_model.model.blocks[0].norm.weight.requires_grad_(True)
    return _refusal(lambda: adapter_shards(model))


def refuses_to_merge_weight_decomposition() -> list[str]:
    return _refusal(lambda: merged_shards(_lora(use_dora=True, target_modules=["up"])))


def refuses_to_merge_flat_parameters() -> list[str]:
    return _refusal(lambda: merged_shards(wrap_flat(_lora())))


def refuses_to_merge_twice() -> list[str]:
    model = _lora()
    model.merge_adapter()
    return _refusal(lambda: merged_shards(model))
