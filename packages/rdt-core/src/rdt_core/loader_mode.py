"""Watches an engine's loader at work on placeholders, and writes down its copies instead of making them.

A placeholder is a tensor on the meta device: it has a shape and no values. Every operation of the loader's
thread passes :class:`LoaderMode`. Views keep their storage, so they need no watching; operations that move
elements into a new storage leave an :data:`~rdt_core.provenance.Origin`; whatever computes values taints
its result; whatever asks for a value is refused. Nothing reaches the model's memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rdt_core.describe import span_bytes
from rdt_core.errors import UnsupportedLoaderError
from rdt_core.loader_ops import (
    COPYING,
    CREATING,
    MOVING,
    REBINDING,
    RESHAPING,
    as_result,
    asks_for_value,
    aten,
    is_view,
    is_writing,
    overwrites,
    tensors_in,
    written_arguments,
)
from rdt_core.provenance import (
    MAX_NUMBERED,
    Computed,
    Constant,
    Joined,
    Named,
    Numbered,
    Numbering,
    Origin,
    View,
    casts_of,
    is_one_rounding,
    join_casts,
    list_pairs,
    names_of,
)
from rdt_core.strided import Axis, Pairing, is_gapless
from rdt_core.write_log import Write, WriteLog, is_covered, settle, unit_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rdt_core.live_memory import LiveMemory


class LoaderMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is untyped
    """Records what one thread's operations do with placeholders. Used as a context, once.

    Args:
        memory: of the model that is loaded.

    Attributes:
        numbering: of all checkpoint tensors.
        log: what was written into the model, in order.
        current: the tensor that the loader was last seen to handle.
        emptied: checkpoint tensors that the loader filled with a constant.
        refusal: the first operation that was refused, which the loader may have gone on after.
    """

    def __init__(self, memory: LiveMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's class is untyped
        self._memory = memory
        self._origins: dict[int, Origin] = {}
        self._kept: list[torch.Tensor] = []  # storages whose address is a key must not be freed
        self.numbering = Numbering()
        self.log = WriteLog()
        self.current = ""
        self.emptied: set[str] = set()
        self.refusal: UnsupportedLoaderError | None = None

    def add_source(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A placeholder for a checkpoint tensor. Called before the loader runs."""
        placeholder = torch.empty(shape, dtype=dtype, device="meta")
        origin = Named(name, shape, dtype)
        self.numbering.add(origin)
        self._set_origin(placeholder, origin)
        return placeholder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Handle one operation. Called by torch, with this mode switched off meanwhile."""
        kwargs = kwargs or {}
        involved = tensors_in((*args, *kwargs.values()))
        self._note_current(involved)
        if is_writing(func) and func not in RESHAPING:
            return self._write(func, involved, args, kwargs)
        if is_view(func):
            return func(*args, **kwargs)
        if func in CREATING:
            return self._create(func, args, kwargs)
        tracked = [tensor for tensor in involved if self._is_tracked(tensor)]
        return self._read(func, tracked, args, kwargs) if tracked else func(*args, **kwargs)

    # What a tensor's elements are.

    def _set_origin(self, tensor: torch.Tensor, origin: Origin) -> None:
        self._kept.append(tensor)
        self._origins[_key(tensor)] = origin

    def _origin(self, tensor: torch.Tensor) -> Origin:
        """Where a tensor's elements come from, whatever it is."""
        if self._memory.find_window(tensor) is not None:
            return Computed(self._live_names(tensor), "a read of a live parameter", tensor.dtype)
        unknown = "a copy of memory that it did not load"
        found = self._origins.get(_key(tensor)) or Computed(frozenset(), unknown, tensor.dtype)
        if found.dtype != tensor.dtype:
            return Computed(names_of(found), f"a view as {tensor.dtype}", tensor.dtype)
        return found

    def _is_tracked(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type == "meta" or _key(tensor) in self._origins:
            return True
        return bool(self._live_names(tensor))

    def _live_names(self, tensor: torch.Tensor) -> frozenset[str]:
        window = self._memory.find_window(tensor)
        if window is None or not tensor.numel():
            return frozenset()
        return self.log.names_touching(window, *span_bytes(tensor))

    def _names(self, tensors: Iterable[torch.Tensor]) -> frozenset[str]:
        return frozenset().union(*(names_of(self._origin(t)) for t in tensors))

    def _note_current(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            origin = self._origins.get(_key(tensor)) if tensor.device.type == "meta" else None
            if isinstance(origin, Named):
                self.current = origin.name

    def _refuse(self, operation: str, names: Iterable[str] = ()) -> UnsupportedLoaderError:
        named = sorted(names)
        name = self.current if self.current in named or not named else named[0]
        self.refusal = self.refusal or UnsupportedLoaderError(name or "(no tensor yet)", operation)
        return self.refusal

    # Operations that read tracked tensors.

    def _read(
        self, func: Any, tracked: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func in COPYING and self._origins.get(_key(args[0])):
            return self._copy_out(func, args[0], kwargs)
        if func is aten.cat.default:
            return self._join(func, args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0))
        if func is aten.stack.default:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            dim += args[0][0].dim() + 1 if dim < 0 else 0
            return self._join(aten.cat.default, [t.unsqueeze(dim) for t in args[0]], dim)
        if func in MOVING and len(tracked) == 1 and tracked[0] is args[0]:
            moved = self._move(func, args, kwargs)
            if moved is not None:
                return moved
        return self._read_otherwise(func, tracked, args, kwargs)

    def _read_otherwise(
        self, func: Any, tracked: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A view, which shares its storage, or a computation, which taints what it makes."""
        if asks_for_value(func):
            raise self._refuse(str(func), self._names(tracked))
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        before = {_key(tensor) for tensor in tensors_in((*args, *kwargs.values()))}
        for tensor in tensors_in([result]):
            if _key(tensor) not in before:
                self._set_origin(
                    tensor, Computed(self._names(tracked), self._cause(tracked, func), tensor.dtype)
                )
        return result

    def _cause(self, tracked: Iterable[torch.Tensor], func: Any) -> str:
        """The first operation that computed values, of which ``func`` may be only the last."""
        origins = map(self._origin, tracked)
        return next((o.operation for o in origins if isinstance(o, Computed) and o.names), str(func))

    def _copy_out(self, func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """``clone`` and ``to``: the result stays a placeholder, whatever device was asked for."""
        kept = {key: value for key, value in kwargs.items() if key in ("dtype", "memory_format")}
        out: torch.Tensor = func(source, **kept)
        self._set_joined(out, 0, [source], str(func))
        return out

    def _join(self, func: Any, tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        out: torch.Tensor = func(list(tensors), dim)
        # An empty one-dimensional tensor may be joined with anything, and adds nothing.
        parts = [t for t in tensors if t.shape != (0,) or out.dim() == 1]
        self._set_joined(out, dim % out.dim(), parts, str(func))
        return out

    def _set_joined(self, out: torch.Tensor, dim: int, parts: Sequence[torch.Tensor], operation: str) -> None:
        origins = [self._origin(part) for part in parts]
        casts = join_casts(origins, out.dtype)
        computed = [origin for origin in origins if isinstance(origin, Computed)]
        if computed or casts is None or not _is_dense(out):
            cause = next((origin.operation for origin in computed), operation)
            self._set_origin(out, Computed(self._names(parts), cause, out.dtype))
            return
        order = sorted(range(out.dim()), key=lambda d: (out.stride(d), out.shape[d] > 1), reverse=True)
        views = tuple(
            View(
                origin,
                int(part.storage_offset()),
                tuple(part.shape[d] for d in order),
                tuple(part.stride(d) for d in order),
            )
            for origin, part in zip(origins, parts, strict=True)
        )
        shape = tuple(out.shape[d] for d in order)
        self._set_origin(out, Joined(shape, order.index(dim) if order else 0, views, out.dtype, casts))

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Do to numbers of elements what the loader does to the elements; None where that is not possible."""
        source = args[0]
        origin = self._origin(source)
        if isinstance(origin, Computed) or source.numel() > MAX_NUMBERED:
            return None
        rest = list(args[1:])
        if func is aten.constant_pad_nd.default:
            value = rest[1] if len(rest) > 1 else kwargs.get("value", 0)
            rest, kwargs = [rest[0], self.numbering.constant(_constant(value, source.dtype))], {}
        numbers = func(self._numbers(origin, source), *rest, **kwargs).contiguous()
        out = torch.empty(numbers.shape, dtype=source.dtype, device="meta")
        self._set_origin(out, Numbered(numbers.flatten(), self.numbering, out.dtype, casts_of(origin)))
        return out

    def _numbers(self, origin: Origin, view: torch.Tensor) -> torch.Tensor:
        elements, _ = list_pairs(_pairing(view, view))
        return self.numbering.of(origin, elements).view(view.shape)

    def _create(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        out: torch.Tensor = func(*args, **kwargs)
        value = CREATING[func](args)
        if out.device.type == "meta" and value is not None:
            self._set_origin(out, _constant(value, out.dtype))
        return out

    # Operations that write.

    def _write(
        self, func: Any, involved: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func in (aten.copy_.default, aten.fill_.Tensor):
            return self._copy_in(args[0], args[1])
        if func is aten._foreach_copy_.default:
            for target, source in zip(args[0], args[1], strict=True):
                self._copy_in(target, source)
            return None
        if func in (aten.zero_.default, aten.fill_.Scalar):
            return self._fill(args[0], args[1] if len(args) > 1 else 0)
        return self._write_otherwise(func, involved, args, kwargs)

    def _copy_in(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if source.numel() == 1 and not self._is_tracked(source) and self._memory.find_window(source) is None:
            return self._fill(target, source.item())
        source = source.expand(target.shape)
        self._check_not_expanded(target)
        window = self._memory.find_window(target)
        if window is not None:
            self._log_copy(window, target, source)
        elif target.device.type == "meta":
            self._overwrite(target, source)
        elif source.device.type == "meta" or self._memory.overlaps(target):
            raise self._refuse("a copy into memory that is no parameter's", self._names([source]))
        elif self._is_tracked(source):  # something derived from parameters: the engine keeps its old values
            self._taint([target], self._names([source]), self._cause([source], aten.copy_.default))
        else:
            target.copy_(source)
        return target

    def _check_not_expanded(self, target: torch.Tensor) -> None:
        if any(n > 1 and step == 0 for n, step in zip(target.shape, target.stride(), strict=True)):
            raise self._refuse("a write into an expanded view")

    def _log_copy(self, window: str, target: torch.Tensor, source: torch.Tensor) -> None:
        origin = self._origin(source)
        if isinstance(origin, Computed) and not origin.names:
            if self._memory.find_window(source) is not None or source.device.type == "meta":
                raise self._refuse(origin.operation)
            operation = "a copy of values that are not in the checkpoint"
            origin = Computed(self._present(), operation, source.dtype)
        else:
            origin = self._as_landed(origin, target.dtype)
        self.log.add(Write(window, target.dtype, origin, _pairing(source, target), self.current))

    def _as_landed(self, origin: Origin, target: torch.dtype) -> Origin:
        """The origin, or that its values are computed when landing would convert them differently."""
        casts = casts_of(origin)
        for name in names_of(origin) if not isinstance(origin, Computed) else ():
            source = self.numbering.tensors[self.numbering.index[name]].dtype
            if not is_one_rounding(source, casts, target):
                chain = " -> ".join(map(_dtype_name, (source, *casts, target)))
                return Computed(names_of(origin), f"the casts {chain}", target)
        return origin

    def _present(self) -> frozenset[str]:
        """The tensor at work, which a write of no known origin is charged to."""
        if not self.current:
            raise self._refuse("a write before the first tensor")
        return frozenset((self.current,))

    def _overwrite(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """A copy between placeholders: the target's storage gets another origin."""
        if _is_dense(target):
            self._set_joined(target, 0, [source], "aten.copy_.default")
            return
        old, new = self._origins.get(_key(target)), self._origin(source)
        origins = [new] if old is None else [new, old]
        casts = join_casts(origins, target.dtype)
        computed = next((origin for origin in origins if isinstance(origin, Computed)), None)
        if computed is not None or casts is None:
            cause = computed.operation if computed is not None else "copies of different element types"
            self._taint([target], self._names([target, source]), cause)
        else:
            self._renumber(target, new, source, casts)

    def _renumber(
        self, target: torch.Tensor, new: Origin, source: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        """Give every element of the target's storage its own number, since its parts now differ in origin."""
        total = _num_elements(target)
        if total > MAX_NUMBERED:
            self._taint([target], self._names([target, source]), "copies into parts of a large tensor")
            return
        old = self._origins.get(_key(target)) or Computed(frozenset(), "", target.dtype)
        flat = self.numbering.of(old, torch.arange(total)).clone()
        changed = flat.as_strided(target.shape, target.stride(), target.storage_offset())
        changed.copy_(self._numbers(new, source))
        self._set_origin(target, Numbered(flat, self.numbering, target.dtype, casts))

    def _fill(self, target: torch.Tensor, value: float) -> torch.Tensor:
        self._check_not_expanded(target)
        constant = _constant(value, target.dtype)
        window = self._memory.find_window(target)
        if window is not None:
            self.log.add(Write(window, target.dtype, constant, _pairing(target, target), self.current))
        elif target.device.type == "meta":
            self._fill_placeholder(target, constant)
        elif self._memory.overlaps(target):
            raise self._refuse("a fill of memory that overlaps a parameter's")
        else:
            target.fill_(value)
        return target

    def _fill_placeholder(self, target: torch.Tensor, constant: Constant) -> None:
        """The loader changes a checkpoint tensor: only its placeholder learns of it."""
        old = self._origins.get(_key(target))
        if _is_dense(target):
            self.emptied |= names_of(old) if isinstance(old, Named) else set()
            self._set_origin(target, constant)
        elif old is not None and (isinstance(old, Computed) or old.dtype != target.dtype):
            self._taint([target], self._names([target]), self._cause([target], aten.fill_.Scalar))
        else:
            self._renumber(target, constant, target, casts_of(old) if old is not None else ())

    def _write_otherwise(
        self, func: Any, involved: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Anything but a copy or a fill, and so nothing that reads can bring."""
        written = written_arguments(func, args, kwargs)
        names = self._names(involved)
        is_ours = any(self._memory.find_window(t) is not None for t in written)
        if not is_ours and not any(map(self._is_tracked, involved)):
            if any(map(self._memory.overlaps, written)):
                raise self._refuse(str(func))
            return func(*args, **kwargs)
        if func._schema.name in REBINDING:  # noqa: SLF001  # torch has no public name for a schema
            raise self._refuse(str(func), names)
        may_overwrite = overwrites(func, args, kwargs)
        for tensor in written:
            if self._memory.find_window(tensor) is not None:
                self._log_computed(func, tensor, names, may_overwrite=may_overwrite)
            elif tensor.device.type != "meta" and any(t.device.type == "meta" for t in involved):
                raise self._refuse(f"{func} into memory that is no parameter's", names)
            else:
                self._taint([tensor], names, str(func))
        return as_result(func, written)

    def _log_computed(
        self, func: Any, target: torch.Tensor, names: frozenset[str], *, may_overwrite: bool
    ) -> None:
        window = self._memory.find_window(target)
        if window is None or not target.numel():
            return
        if not may_overwrite and not self._was_written(window, target):
            # It would be applied again at every version, on top of the version before.
            raise self._refuse(f"{func} on a parameter that it did not load", names)
        origin = Computed(names or self._present(), str(func), target.dtype)
        self.log.add(Write(window, target.dtype, origin, _pairing(target, target), self.current))

    def _was_written(self, window: str, target: torch.Tensor) -> bool:
        writes = self.log.touching_view(window, target)
        return is_covered(settle(writes, unit_of(writes, [target])), target)

    def _taint(self, tensors: Iterable[torch.Tensor], names: frozenset[str], operation: str) -> None:
        for tensor in tensors:
            self._set_origin(tensor, Computed(names or self._present(), operation, tensor.dtype))


def _key(tensor: torch.Tensor) -> int:
    """Identity of a storage; views share it. Torch has no public name for it."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  # see above


def _num_elements(tensor: torch.Tensor) -> int:
    """Elements of the whole storage."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor takes up its storage without gaps, in any order of dims."""
    return tensor.numel() == _num_elements(tensor) and is_gapless(tensor.shape, tensor.stride(), 1)


def _pairing(source: torch.Tensor, target: torch.Tensor) -> Pairing:
    """Elements of one view and bytes of another of the same shape."""
    itemsize = target.element_size()
    steps = zip(target.shape, source.stride(), target.stride(), strict=True)
    axes = tuple(Axis(n, from_step, to_step * itemsize) for n, from_step, to_step in steps)
    return Pairing(int(source.storage_offset()), int(target.storage_offset()) * itemsize, axes)


def _constant(value: float, dtype: torch.dtype) -> Constant:
    return Constant(torch.full((), value, dtype=dtype).item(), dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
