"""What torch's operations do to the tensors that they are given: tables, and what their schemas say."""

# ruff: noqa: SLF001  # torch keeps schemas and kernel tables under private names and offers no others

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

aten = torch.ops.aten

# Change what a tensor object points at, or how it is seen, and no element.
RESHAPING = {
    aten.t_.default,
    aten.transpose_.default,
    aten.squeeze_.default,
    aten.squeeze_.dim,
    aten.unsqueeze_.default,
    aten.as_strided_.default,
    aten.detach_.default,
}
# Change which memory a tensor object has.
REBINDING = {"aten::set_", "aten::resize_", "aten::resize_as_"}
# Write some elements of their first argument and read none of it.
OVERWRITING = {
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten.index_copy_.default,
    aten.index_fill_.int_Scalar,
    aten.masked_fill_.Scalar,
    aten.masked_scatter_.default,
    aten.scatter_.src,
    aten.scatter_.value,
}
# Copy one tensor's elements as they are into a new storage.
COPYING = {aten.clone.default, aten._to_copy.default}
# Move elements of one tensor about, at places that depend on no value of it.
MOVING = {
    aten.index_select.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.take.default,
    aten.repeat.default,
    aten.flip.default,
    aten.roll.default,
    aten.constant_pad_nd.default,
}
# New tensors that have only the shape of a tracked one; the value they begin with, or None.
CREATING: dict[Any, Callable[[Sequence[Any]], float | None]] = {
    aten.empty_like.default: lambda _: None,
    aten.new_empty.default: lambda _: None,
    aten.new_empty_strided.default: lambda _: None,
    aten.zeros_like.default: lambda _: 0,
    aten.new_zeros.default: lambda _: 0,
    aten.ones_like.default: lambda _: 1,
    aten.new_ones.default: lambda _: 1,
    aten.full_like.default: lambda args: args[1],
    aten.new_full.default: lambda args: args[2],
    aten.zeros.default: lambda _: 0,
    aten.ones.default: lambda _: 1,
    aten.full.default: lambda args: args[1],
}
# Answer with a number that depends on no element.
DESCRIBING = {aten.is_same_size.default, aten.is_pinned.default}


def tensors_in(arguments: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors among an operation's arguments or results, those in lists included."""
    found: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, list | tuple):
            found += tensors_in(argument)
    return found


@functools.cache
def is_writing(func: Any) -> bool:
    """Whether an operation changes one of its arguments."""
    return bool(func._schema.is_mutable)


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operation always answers with a view; ``reshape`` and its kind only do so at times."""
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    aliases = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
    return aliases and not is_composite


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors that an operation changes, by its schema."""
    written: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors_in([args[position] if position < len(args) else kwargs.get(argument.name)])
    return written


def overwrites(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation only writes to its first argument, and does not add to what is there."""
    if func not in OVERWRITING:
        return False
    names = [argument.name for argument in func._schema.arguments]
    return not {**dict(zip(names, args, strict=False)), **kwargs}.get("accumulate", False)


def as_result(func: Any, written: list[torch.Tensor]) -> Any:
    """What an in-place operation returns."""
    num_returns = len(func._schema.returns)
    return None if num_returns == 0 else written[0] if num_returns == 1 else tuple(written)


def asks_for_value(func: Any) -> bool:
    """Whether an operation answers with something else than tensors, or with as many as values decide."""
    if torch.Tag.dynamic_output_shape in func.tags and func not in MOVING:
        return True
    if func in DESCRIBING or func.namespace == "prim" or func._schema.name.startswith("aten::sym_"):
        return False
    return any("Tensor" not in str(returned.type) for returned in func._schema.returns)
