"""What ranks of ``FullyShardedDataParallel`` (FSDP1) hold: runs of elements of parameters laid end to end.

Source: torch/distributed/fsdp/_flat_param.py, FlatParameter (2.13): ``_fqns``, ``_shapes`` and
``_shard_param_infos`` go together by index, and ``_local_shard`` is the memory that the optimizer writes,
from the first forward on; before, it is the flat parameter's own.
"""

# ruff: noqa: SLF001  FSDP1 has no public way to its flat parameters

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter

from rdt_core.errors import UnsupportedLayoutError
from rdt_megatron.flat_range import boxes_of_range
from rdt_megatron.names import strip_wrappers
from rdt_megatron.part import Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn


class FlatShards:
    """Every flat parameter of a model that FSDP1 wraps; empty when none is.

    Args:
        modules: all of them, by name; FSDP1 wraps some or none.
        rank: global trainer rank, for errors.

    Raises:
        UnsupportedLayoutError: parameters are offloaded to the CPU.
    """

    def __init__(self, modules: Mapping[str, nn.Module], rank: int) -> None:
        self._flats = [
            (strip_wrappers(prefix), _flat_of(module, prefix, rank))
            for prefix, module in modules.items()
            if isinstance(module, FullyShardedDataParallel) and module._handle is not None
        ]

    def owns(self, module: nn.Module, attribute: str, tensor: torch.Tensor) -> bool:
        """Whether a module's parameter is a flat one, or lives in one."""
        if not self._flats:
            return False
        return isinstance(tensor, FlatParameter) or (id(module), attribute) in self._owned

    @functools.cached_property
    def _owned(self) -> set[tuple[int, str]]:
        infos = (info for _, flat in self._flats for info in (*flat._param_infos, *flat._shared_param_infos))
        return {(id(info.module), info.param_name) for info in infos}

    def parts(self) -> Iterator[Part]:
        """What this rank's shards hold of every parameter."""
        for prefix, flat in self._flats:
            for fqn, shape, info in zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True):
                if info.in_shard and info.numel_in_shard:
                    name = strip_wrappers(f"{prefix}.{fqn}" if prefix else fqn)
                    yield from _parts_of(flat, name, tuple(shape), info)


def _flat_of(module: Any, prefix: str, rank: int) -> Any:
    handle = module._handle
    if handle._offload_params:
        raise UnsupportedLayoutError(
            strip_wrappers(prefix) or "the model",
            rank,
            "FullyShardedDataParallel offloads it to the CPU between steps",
            "Wrap it without CPUOffload(offload_params=True).",
        )
    return handle.flat_param


def _parts_of(flat: Any, name: str, shape: tuple[int, ...], info: Any) -> Iterator[Part]:
    start = info.intra_param_start_idx
    for at, region in boxes_of_range(shape, start, info.intra_param_end_idx + 1):
        offset = info.offset_in_shard + at - start
        yield Part(name, shape, region, functools.partial(_find, flat, offset, region.shape))


def _find(flat: Any, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    shard: torch.Tensor = getattr(flat, "_local_shard", flat)
    size = 1
    for n in shape:
        size *= n
    return shard.detach()[offset : offset + size].view(shape)
