"""Finds out where an engine's own loader puts every checkpoint tensor, without loading anything.

:func:`record_loader` runs the loader once on placeholders and follows every copy back to a region of a
checkpoint tensor. What reads cannot bring (computed values, precision lost on the way, very ragged
selections) is named in ``Recording.reload`` and goes through the loader at every version. What an engine
*derives* from its parameters outside of them (absorbed projections, packed copies, plain attributes) is not
seen here: ``EngineModel.finalize`` recomputes it.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from rdt_core.describe import dtype_name
from rdt_core.errors import (
    ModelMismatchError,
    RdtError,
    UncoveredParameterError,
    UnsupportedLoaderError,
    UnusedTensorError,
)
from rdt_core.live_memory import LiveMemory
from rdt_core.loader_mode import LoaderMode
from rdt_core.manifest import Shard
from rdt_core.provenance import (
    MAX_PIECES,
    Computed,
    Constant,
    Named,
    UndefinedError,
    casts_of,
    names_of,
    trace,
)
from rdt_core.recording import Fill, Recording
from rdt_core.region import Region
from rdt_core.strided import TooManyBoxesError, cut_into_boxes
from rdt_core.write_log import is_covered, settle, unit_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch.nn import Module

    from rdt_core.manifest import TensorSpec
    from rdt_core.provenance import Leaf, Numbering
    from rdt_core.write_log import Remnant, Settled, WriteLog

    Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], object]

# What a model's own code may raise when a tensor does not fit. Anything else is a fault of its own.
LOADER_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# Every dtype that this project moves holds these numbers, so that casts between them change nothing.
EXACT_CONSTANTS = (0, 1, -1)

# How torch puts it when an operation that it does not dispatch wants a placeholder's values.
_NEEDS_VALUES = re.compile(r"(\b|_)meta\b|unallocated storage", re.IGNORECASE)

TOO_RAGGED = f"a copy of more than {MAX_PIECES} separate pieces"

_SKIPPABLE = re.compile(r"(^|\.)rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")


def is_rotary_table(name: str) -> bool:
    """Whether a tensor is a table of rotary frequencies, which engines compute and do not load."""
    return _SKIPPABLE.search(name) is not None


def record_loader(
    model: Module,
    specs: Sequence[TensorSpec],
    load: Loader | None = None,
    *,
    skippable: Callable[[str], bool] = is_rotary_table,
) -> Recording:
    """Where every region of the given checkpoint tensors lands in ``model``.

    Called by an engine adapter once at connect, on every engine rank, from the thread that runs the model.
    Takes seconds, no collective. Leaves every parameter, buffer and tensor attribute of a module as it was,
    also after an error; other attributes that the loader sets stay set. A replay is ``EngineModel.load`` of
    the reload tensors, then shards and fills in any order, then ``EngineModel.finalize``.

    Args:
        model: this rank's live model.
        specs: every tensor that the trainer exports, with its global shape.
        load: the engine's loader; ``model.load_weights`` by default. Must not hand tensors to other threads.
        skippable: whether the loader may drop a tensor of this name (a tied ``lm_head.weight``, say).

    Raises:
        ModelMismatchError: the loader refused a tensor.
        UnusedTensorError: the loader dropped a tensor that is not skippable.
        UncoveredParameterError: no tensor fills a part of a parameter.
        UnsupportedLoaderError: the loader does what cannot be replayed; nothing was recorded.
    """
    memory = LiveMemory(model)
    mode = LoaderMode(memory)
    sources = [(spec.name, _placeholder(mode, spec)) for spec in specs]
    _run(load or _own_loader(model), mode, memory, sources)
    return _Resolver(mode, memory).resolve(specs, skippable)


def _own_loader(model: Module) -> Loader:
    loader: Loader = model.load_weights  # type: ignore[assignment]  # torch types every attribute as a module
    return loader


def _placeholder(mode: LoaderMode, spec: TensorSpec) -> torch.Tensor:
    return mode.add_source(spec.name, spec.shape, getattr(torch, spec.dtype))


def _run(
    load: Loader, mode: LoaderMode, memory: LiveMemory, sources: Sequence[tuple[str, torch.Tensor]]
) -> None:
    """Run the loader once; translate what it raises."""

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, placeholder in sources:
            mode.current = name
            yield name, placeholder

    try:
        with torch.no_grad(), mode:
            load(stream())
    except RdtError:
        raise
    except LOADER_ERRORS as error:
        raise _translate(mode, error) from error
    finally:
        moved = memory.restore()
    if mode.refusal is not None:  # the loader went on after it
        raise mode.refusal
    if moved is not None:
        raise UnsupportedLoaderError(mode.current, f"an exchange of the memory of parameter {moved}")


def _translate(mode: LoaderMode, error: Exception) -> ModelMismatchError:
    """What to tell of an error of the loader. Torch names the meta device when a value was asked for."""
    if mode.refusal is not None:
        return mode.refusal
    told = f"{type(error).__name__}: {error}"
    is_torch_like = isinstance(error, RuntimeError | TypeError | ValueError)
    if is_torch_like and _NEEDS_VALUES.search(str(error)):
        return UnsupportedLoaderError(mode.current, f"an operation that needs values ({told})")
    return ModelMismatchError(mode.current, told)


class _Landed(NamedTuple):
    """One remnant's part in the result, and all tensors that its write involves."""

    names: frozenset[str]
    shards: list[Shard]
    fills: list[Fill]


class _Resolver:
    """Turns the log of a run into a recording."""

    def __init__(self, mode: LoaderMode, memory: LiveMemory) -> None:
        self._numbering: Numbering = mode.numbering
        self._log: WriteLog = mode.log
        self._emptied = frozenset(mode.emptied)
        self._memory = memory
        self._holders: dict[str, list[torch.Tensor]] = {}
        for holder in memory.holders:
            self._holders.setdefault(memory.find_window(holder.alias) or "", []).append(holder.alias)
        self._reload: dict[str, str] = {}

    def resolve(self, specs: Sequence[TensorSpec], skippable: Callable[[str], bool]) -> Recording:
        """The recording, when every tensor is used and every parameter is filled."""
        used = self._emptied.union(*(names_of(write.origin) for write in self._log))
        used |= {spec.name for spec in specs if 0 in spec.shape}
        unused = [spec.name for spec in specs if spec.name not in used]
        lost = tuple(name for name in unused if not skippable(name))
        if lost:
            raise UnusedTensorError(lost)
        settled = {window: self._settle(window) for window in self._log.by_window}
        self._check_covered(settled)
        landed = [self._land(remnant) for found in settled.values() for remnant in found.remnants]
        self._limit_shards(landed)
        self._spread_reload(landed)
        shards = [s for part in landed for s in part.shards if s.tensor not in self._reload]
        fills = [fill for part in landed for fill in part.fills]
        filled = {shard.window for shard in shards} | {fill.window for fill in fills}
        return Recording(
            shards=tuple(shards),
            windows={name: flat for name, flat in self._memory.windows.items() if name in filled},
            reload=dict(sorted(self._reload.items())),
            fills=tuple(fills),
            skipped=frozenset(unused),
        )

    def _settle(self, window: str) -> Settled:
        writes = self._log.by_window[window]
        return settle(writes, unit_of(writes, self._holders[window]))

    def _check_covered(self, settled: dict[str, Settled]) -> None:
        missing = []
        for holder in self._memory.holders:
            found = settled.get(self._memory.find_window(holder.alias) or "")
            is_filled = is_covered(found, holder.alias) if found is not None else not holder.alias.numel()
            if not is_filled and (holder.is_parameter or self._was_touched(holder.alias)):
                missing.append(holder.name)
        if missing:
            raise UncoveredParameterError(tuple(missing))

    def _was_touched(self, tensor: torch.Tensor) -> bool:
        window = self._memory.find_window(tensor)
        return window is not None and bool(self._log.touching_view(window, tensor))

    def _land(self, remnant: Remnant) -> _Landed:
        """The shards and fills of one remnant; when there are too many, its tensors are to be reloaded."""
        write = remnant.write
        names = names_of(write.origin)
        landed = _Landed(names, [], [])
        if isinstance(write.origin, Computed):
            self._mark(names, write.origin.operation)
            return landed
        try:
            for leaf in self._leaves(remnant):
                self._add_leaf(landed, remnant, leaf)
        except TooManyBoxesError:
            landed.shards.clear()
            landed.fills.clear()
            if not names:
                raise UnsupportedLoaderError(write.tensor, "a fill of very many separate places") from None
            self._mark(names, TOO_RAGGED)
        except UndefinedError:
            raise UnsupportedLoaderError(write.tensor, "a copy of memory that it did not load") from None
        return landed

    def _leaves(self, remnant: Remnant) -> Iterator[Leaf]:
        write, left = remnant
        if left is None:
            return trace(self._numbering, write.origin, write.pairing)
        sources, targets = left
        return self._numbering.leaves(self._numbering.of(write.origin, sources), targets)

    def _add_leaf(self, landed: _Landed, remnant: Remnant, leaf: Leaf) -> None:
        write = remnant.write
        if isinstance(leaf.origin, Named):
            landed.shards.extend(_make_shards(write.window, dtype_name(write.dtype), leaf.origin, leaf))
            if len(landed.shards) > MAX_PIECES:
                raise TooManyBoxesError
            return
        if casts_of(write.origin) and leaf.origin.value not in EXACT_CONSTANTS:
            raise UnsupportedLoaderError(write.tensor, f"casts of the constant {leaf.origin.value}")
        landed.fills.append(_make_fill(write.window, dtype_name(write.dtype), leaf.origin, leaf))

    def _mark(self, names: Iterable[str], operation: str) -> None:
        for name in names:
            self._reload.setdefault(name, operation)

    def _limit_shards(self, landed: Sequence[_Landed]) -> None:
        counts = Counter(shard.tensor for part in landed for shard in part.shards)
        self._mark((name for name, count in counts.items() if count > MAX_PIECES), TOO_RAGGED)

    def _spread_reload(self, landed: Sequence[_Landed]) -> None:
        """Tensors that the loader joins must all be given to it when one of them is."""
        joined = [part.names for part in landed if len(part.names) > 1]
        num_before = -1
        while num_before != len(self._reload):
            num_before = len(self._reload)
            for names in joined:
                operation = next((self._reload[name] for name in sorted(names) if name in self._reload), None)
                if operation is not None:
                    self._mark(names, operation)


def _make_shards(window: str, dtype: str, tensor: Named, leaf: Leaf) -> Iterator[Shard]:
    for box in cut_into_boxes(leaf.pairing, tensor.shape, limit=MAX_PIECES):
        stop = tuple(first + count for first, count in zip(box.start, box.shape, strict=True))
        yield Shard(
            tensor=tensor.name,
            region=Region(box.start, stop),
            window=window,
            offset_bytes=box.target,
            stride_bytes=box.target_steps,
            dtype=dtype,
        )


def _make_fill(window: str, dtype: str, constant: Constant, leaf: Leaf) -> Fill:
    return Fill(
        window=window,
        offset_bytes=leaf.pairing.target,
        shape=tuple(axis.length for axis in leaf.pairing.axes),
        stride_bytes=tuple(axis.target_step for axis in leaf.pairing.axes),
        dtype=dtype,
        value=constant.value,
    )
