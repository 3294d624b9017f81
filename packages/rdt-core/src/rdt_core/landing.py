"""The memory that a version lands in, and the copies from there into the engine's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rdt_core.describe import typed_view
from rdt_core.dtypes import itemsize_bytes
from rdt_core.layout import row_major_strides
from rdt_core.local_copies import LocalCopies
from rdt_core.manifest import Manifest, Shard, Window
from rdt_core.plan import RELOAD_PREFIX, DirectRead
from rdt_core.region import Region
from rdt_core.row_views import view_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdt_core.manifest import TensorSpec
    from rdt_core.plan import Plan, Read
    from rdt_core.recording import Recording


@dataclass(frozen=True, slots=True)
class Landing:
    """What one engine rank prepares once, at connect, and uses at every version.

    Args:
        buffer: flat uint8 memory that the reads fill.
        reload_buffers: whole checkpoint tensors for the engine's own loader, by name.
        to_reload: copies from the buffer into the reload buffers.
        to_parameters: copies from the buffer into live parameters.
        windows: by name, flat uint8 views that direct reads land in.
        fills: (target, value), constants that the engine's loader writes beside what it copies.
    """

    buffer: torch.Tensor
    reload_buffers: Mapping[str, torch.Tensor]
    to_reload: LocalCopies
    to_parameters: LocalCopies
    windows: Mapping[str, torch.Tensor]
    fills: tuple[tuple[torch.Tensor, float], ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory held by the landing."""
        return self.buffer.numel() + sum(t.numel() * t.element_size() for t in self.reload_buffers.values())

    def targets(self, reads: Sequence[Read | DirectRead]) -> list[torch.Tensor]:
        """Where a trainer rank's reads land, as uint8 views of the buffer or of an engine window."""
        return [self._target(read) for read in reads]

    def _target(self, read: Read | DirectRead) -> torch.Tensor:
        memory = self.windows[read.target_window] if isinstance(read, DirectRead) else self.buffer
        return view_rows(memory, read.target)

    def fill_reload_buffers(self) -> None:
        """Assemble the tensors for the engine's loader. Touches no parameter."""
        self.to_reload.run()

    def fill_parameters(self) -> None:
        """Copy every region that landed beside its parameter into it, and set what the loader fills."""
        self.to_parameters.run()
        with torch.no_grad():
            for target, value in self.fills:
                target.fill_(value)


def engine_manifest(
    recording: Recording,
    specs: Mapping[str, TensorSpec],
    *,
    rank: int,
    world_size: int,
    node: str,
    device: str,
) -> Manifest:
    """What an engine rank wants filled: parameter regions, and whole tensors for the reload path."""
    reload_shards = tuple(_reload_shard(specs[name]) for name in sorted(recording.reload))
    windows = {name: Window(name, flat.numel()) for name, flat in recording.windows.items()}
    windows |= {shard.window: Window(shard.window, shard.nbytes) for shard in reload_shards}
    shards = recording.shards + reload_shards
    return Manifest(
        side="engine",
        rank=rank,
        world_size=world_size,
        node=node,
        device=device,
        windows=windows,
        tensors={shard.tensor: specs[shard.tensor] for shard in shards},
        shards=shards,
    )


def make_landing(
    plan: Plan, recording: Recording, specs: Mapping[str, TensorSpec], device: torch.device
) -> Landing:
    """Allocate the landing memory and every view that a sync will use. Called once, at connect.

    Args:
        plan: what is read.
        recording: of the engine's loader; its windows are what a commit writes.
        specs: every tensor of the group.
        device: where to land; the host's memory for an accelerator's parameters is pinned.
    """
    # Zeroed so that its pages exist before the first version is read.
    buffer = torch.zeros(plan.landing_nbytes, dtype=torch.uint8, device=device)
    if device.type == "cpu" and any(flat.is_cuda for flat in recording.windows.values()):
        buffer = buffer.pin_memory()
    reload_buffers = {
        name: torch.empty(specs[name].shape, dtype=getattr(torch, specs[name].dtype), device=device)
        for name in recording.reload
    }
    windows = dict(recording.windows)
    windows |= {RELOAD_PREFIX + name: t.view(-1).view(torch.uint8) for name, t in reload_buffers.items()}
    to_reload: list[tuple[torch.Tensor, torch.Tensor]] = []
    to_parameters: list[tuple[torch.Tensor, torch.Tensor]] = []
    for copy in plan.copies:
        shape = copy.region.shape
        target = typed_view(
            windows[copy.window], copy.target_dtype, shape, copy.target_offset_bytes, copy.target_stride_bytes
        )
        source = typed_view(
            buffer, copy.source_dtype, shape, copy.landing_offset_bytes, copy.landing_stride_bytes
        )
        chosen = to_reload if copy.window.startswith(RELOAD_PREFIX) else to_parameters
        chosen.append((target, source))
    fills = tuple(
        (typed_view(windows[f.window], f.dtype, f.shape, f.offset_bytes, f.stride_bytes), f.value)
        for f in recording.fills
    )
    return Landing(buffer, reload_buffers, LocalCopies(to_reload), LocalCopies(to_parameters), windows, fills)


def _reload_shard(spec: TensorSpec) -> Shard:
    return Shard(
        tensor=spec.name,
        region=Region.whole(spec.shape),
        window=RELOAD_PREFIX + spec.name,
        offset_bytes=0,
        stride_bytes=row_major_strides(spec.shape, itemsize_bytes(spec.dtype)),
        dtype=spec.dtype,
    )
