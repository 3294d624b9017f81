"""The memory behind a live model's parameters and buffers, and a snapshot of what points where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rdt_core.describe import flat_bytes
from rdt_core.errors import UnsupportedLoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.nn import Module


@dataclass(frozen=True, slots=True)
class Holder:
    """A parameter or buffer, and its memory at the time of the snapshot.

    Args:
        alias: another tensor of the same memory and geometry, which keeps the storage alive.
    """

    name: str
    tensor: torch.Tensor
    alias: torch.Tensor
    is_parameter: bool


class LiveMemory:
    """Knows every storage of a model by address. Made before a loader runs, asked while it runs.

    Raises:
        UnsupportedLoaderError: a parameter has no memory of its own to fill (meta, lazy, or a wrapper class).
    """

    def __init__(self, model: Module) -> None:
        self.holders = [
            _hold(name, tensor, is_parameter) for name, tensor, is_parameter in _tensors_of(model)
        ]
        self._slots = [(slot, dict(slot)) for module in model.modules() for slot in _slots_of(module)]
        self._attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
        self.window_of: dict[int, str] = {}
        self.windows: dict[str, torch.Tensor] = {}
        for holder in self.holders:
            storage = holder.alias.untyped_storage()
            if not storage.nbytes():
                continue
            name = self.window_of.setdefault(storage.data_ptr(), holder.name)
            known = self.windows.get(name)
            if known is None or known.numel() < storage.nbytes():
                self.windows[name] = flat_bytes(holder.alias, 0, storage.nbytes())

    def find_window(self, tensor: torch.Tensor) -> str | None:
        """Name of the window whose storage ``tensor`` is a view of; None when it is none of the model's."""
        if tensor.device.type == "meta":
            return None
        return self.window_of.get(tensor.untyped_storage().data_ptr())

    def overlaps(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of a foreign storage reaches into the memory of one of the model's."""
        if tensor.device.type == "meta":
            return False
        storage = tensor.untyped_storage()
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return any(
            start < flat.data_ptr() + flat.numel() and flat.data_ptr() < stop and tensor.device == flat.device
            for flat in self.windows.values()
        )

    def restore(self) -> str | None:
        """Put every parameter, buffer and plain tensor attribute back to where it pointed. Idempotent.

        Returns:
            The name of a parameter or buffer that had moved, or None. Plain attributes do not count: what
            the loader derived from old weights is dropped, and the engine keeps what it had.
        """
        moved = None
        for attributes, before in self._attributes:
            _restore_tensors(attributes, before)
        for slot, expected in self._slots:
            changed = [n for n in {**slot, **expected} if slot.get(n) is not expected.get(n)]
            if changed or len(slot) != len(expected):
                moved = changed[0] if changed else next(iter({*slot} ^ {*expected}))
                slot.clear()
                slot.update(expected)
        for holder in self.holders:
            if not _is_same_memory(holder.tensor, holder.alias):
                moved = holder.name
                holder.tensor.data = holder.alias
        return moved


def _slots_of(module: Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module keeps its parameters and buffers. Torch has no public way to put one back."""
    return module._parameters, module._buffers  # noqa: SLF001  # see above


def _restore_tensors(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in list(attributes.items()):
        old = before.get(name)
        if value is old or not (isinstance(value, torch.Tensor) or isinstance(old, torch.Tensor)):
            continue
        if name in before:
            attributes[name] = old
        else:
            del attributes[name]
    attributes.update({name: old for name, old in before.items() if isinstance(old, torch.Tensor)})


def _tensors_of(model: Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, True
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, False


def _hold(name: str, tensor: torch.Tensor, is_parameter: bool) -> Holder:  # noqa: FBT001  # a record's field
    if is_lazy(tensor):
        raise UnsupportedLoaderError(name, "late allocation")
    if is_traceable_wrapper_subclass(tensor):
        raise UnsupportedLoaderError(name, f"a wrapper class ({type(tensor).__name__})")
    if tensor.device.type == "meta" and tensor.numel():
        raise UnsupportedLoaderError(name, "late allocation (its device is meta)")
    return Holder(name, tensor, tensor.data, is_parameter)


def _is_same_memory(tensor: torch.Tensor, alias: torch.Tensor) -> bool:
    return (
        tensor.device == alias.device
        and tensor.dtype == alias.dtype
        and tensor.shape == alias.shape
        and tensor.stride() == alias.stride()
        and tensor.storage_offset() == alias.storage_offset()
        and tensor.untyped_storage().data_ptr() == alias.untyped_storage().data_ptr()
    )
