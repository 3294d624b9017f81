"""The exporter for LoRA adapters alone: a small group of its own, under the names of PEFT's checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rdt_core.errors import UnsupportedLayoutError
from rdt_megatron.fsdp import parts_of, reshard, shards_of_parts
from rdt_megatron.names import strip_wrappers
from rdt_megatron.peft_names import AdapterNames
from rdt_megatron.world import rank_and_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch.distributed as dist
    from torch import nn

    from rdt_core.local_shards import LocalShards
    from rdt_megatron.part import Part


def adapter_shards(
    model: nn.Module, *, adapter: str = "default", process_group: dist.ProcessGroup | None = None
) -> LocalShards:
    """Describe the parameters of one LoRA adapter that this trainer rank holds, where they lie.

    Called in every trainer rank, as :func:`rdt_megatron.fsdp_shards` is and under the same conditions: a
    plain model, DDP, FSDP2 and FSDP1. Nothing is gathered, copied or communicated. Attach the result to a
    sync group of its own; the frozen base model is not part of it.

    Names and values are those of ``adapter_model.safetensors``: ``base_model.model. ... .lora_A.weight``,
    ``modules_to_save`` under the names of the modules that they replace. Base layers of embeddings, which
    PEFT saves besides when they are targeted, are not exported: they do not change.

    Args:
        model: a ``PeftModel``, wrapped or not.
        adapter: its name in the model.
        process_group: all trainer ranks; by default the whole world.

    Raises:
        UnsupportedLayoutError: there is no such adapter, it is not LoRA, a parameter is trained that its
            checkpoint does not hold, or memory cannot be described (see ``fsdp_shards``).
    """
    rank, world_size = rank_and_size(process_group)
    modules = dict(model.named_modules())
    reshard(modules)
    names = AdapterNames(modules, adapter, rank)
    with torch.no_grad():
        parts = list(_parts_of_adapter(model, modules, names, rank))
        return shards_of_parts(parts, rank, world_size, names=lambda name: names.in_checkpoint(name) or name)


def _parts_of_adapter(
    model: nn.Module, modules: Mapping[str, nn.Module], names: AdapterNames, rank: int
) -> Iterator[Part]:
    trained = {strip_wrappers(name) for name, p in model.named_parameters() if p.requires_grad}
    for part in parts_of(modules, rank):
        if names.in_checkpoint(part.name) is not None:
            yield part
        elif part.name in trained and not names.holds(part.name):
            raise UnsupportedLayoutError(
                part.name,
                rank,
                "it is trained beside the adapter, and the adapter's checkpoint has no place for it",
                "Freeze it, or name its module in LoraConfig.modules_to_save.",
            )
