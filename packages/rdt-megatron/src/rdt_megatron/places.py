"""Where the parameters of a trainer rank lie now: asked at every publish, for every parameter."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

_shard_of = operator.attrgetter("_local_tensor")
_NOWHERE = torch.empty(0)


class Slot:
    """Where a module looks a parameter or buffer up, and what it held there when it was described.

    Called, it finds the memory that counts now: here, of whatever the module holds.

    Args:
        module: that has the tensor.
        attribute: its name there.
        tensor: what the module held; a DTensor when it is sharded.
    """

    __slots__ = ("attribute", "entries", "tensor")

    def __init__(self, module: nn.Module, attribute: str, tensor: torch.Tensor) -> None:
        # As nn.Module looks it up.
        parameters, buffers = module._parameters, module._buffers  # noqa: SLF001
        self.entries: dict[str, Any] = parameters if attribute in parameters else buffers
        self.attribute, self.tensor = attribute, tensor

    def __call__(self) -> torch.Tensor:
        """The tensor now; of a sharded one, what this rank holds; of one that is gone, an empty one."""
        found: torch.Tensor | None = self.entries.get(self.attribute)
        return _NOWHERE if found is None else local_of(found)


class Places:
    """The current address of every shard, in order. Takes no collective and changes nothing.

    Engines wait while ``publish`` asks, and a rank may hold tens of thousands of parameters. Nearly always
    every module still holds the tensor object that was described: that is asked of all at once, and then
    their addresses, with no step of Python for each. Otherwise each is found on its own.

    Args:
        sources: what finds the tensor of a shard, and how far into it the shard begins, in bytes.
    """

    def __init__(self, sources: Sequence[tuple[Callable[[], torch.Tensor], int]]) -> None:
        self._sources = list(sources)
        slots = [find for find, _ in sources if isinstance(find, Slot)]
        # Those of a scripted module are no dict.
        is_all = len(slots) == len(self._sources)
        self._are_slots = is_all and all(isinstance(slot.entries, dict) for slot in slots)
        self._entries = [slot.entries for slot in slots]
        self._attributes = [slot.attribute for slot in slots]
        self._tensors = [slot.tensor for slot in slots]
        self._sharded = [tensor for tensor in self._tensors if isinstance(tensor, DTensor)]
        with torch.no_grad():
            self._shards = [local_of(tensor) for tensor in self._sharded]
            self._locals = [local_of(tensor) for tensor in self._tensors]
        self._offsets = [offset for _, offset in sources]

    def __call__(self) -> tuple[int, ...]:
        """Addresses in bytes."""
        if self._are_slots and self._hold_what_was_described():
            return tuple(map(operator.add, map(torch.Tensor.data_ptr, self._locals), self._offsets))
        return self.find_each()

    def find_each(self) -> tuple[int, ...]:
        """The same by asking for each on its own, whatever modules hold."""
        with torch.no_grad():
            return tuple(find().data_ptr() + offset for find, offset in self._sources)

    def _hold_what_was_described(self) -> bool:
        held = map(dict.get, self._entries, self._attributes)
        return all(map(operator.is_, held, self._tensors)) and all(
            map(operator.is_, map(_shard_of, self._sharded), self._shards)
        )


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
