"""Tensors that an engine derives from its weights after a load, and how to derive them again in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Hook:
    """One post-load computation of a live model.

    Args:
        name: of the module it belongs to.
        holders: objects whose attributes it may set.
        run: repeats it.
    """

    name: str
    holders: tuple[object, ...]
    run: Callable[[], None]


def refresh(hook: Hook) -> None:
    """Run a hook so that every tensor it derives stays where it was.

    A captured CUDA graph reads derived tensors at the addresses of the capture, so a new tensor of the same
    layout is copied into the old one's memory, which takes its place again.
    """
    before = [_tensors_of(holder) for holder in hook.holders]
    hook.run()
    for holder, old in zip(hook.holders, before, strict=True):
        for name, new in _tensors_of(holder).items():
            if name in old and _is_moved(old[name], new):
                old[name].data.copy_(new.data)
                setattr(holder, name, old[name])


def owner_of(function: object) -> str:
    """The class in which a method is written, as ``module.Class``: the key of tables of known hooks."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return f"{module}.{name.rpartition('.')[0]}"


def _tensors_of(holder: object) -> dict[str, torch.Tensor]:
    named = dict(vars(holder))
    if isinstance(holder, torch.nn.Module):
        named |= dict(holder.named_parameters(recurse=False)) | dict(holder.named_buffers(recurse=False))
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def _is_moved(old: torch.Tensor, new: torch.Tensor) -> bool:
    return old.data_ptr() != new.data_ptr() and _layout_of(old) == _layout_of(new)


def _layout_of(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
