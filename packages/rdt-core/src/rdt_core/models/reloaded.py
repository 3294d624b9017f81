"""An engine's layout of which some tensors go by reload: whole, through the engine's own loader."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rdt_core.errors import ConfigError
from rdt_core.models.parameter import Parameter, whole
from rdt_core.plan import RELOAD_PREFIX

if TYPE_CHECKING:
    import re
    from collections.abc import Iterator

    from rdt_core.manifest import TensorSpec
    from rdt_core.models.parameter import Layout


class ReloadedLayout:
    """A layout of an engine whose loader cannot be replayed for tensors that match.

    As :func:`rdt_core.landing.engine_manifest` describes what a recorder found: such a tensor is needed
    whole, in checkpoint layout, in a window of its own, by every rank that holds a part.

    Args:
        layout: of the engine otherwise.
        pattern: found in the names of the tensors.

    Raises:
        ConfigError: nothing matches.
    """

    side = "engine"

    def __init__(self, layout: Layout, pattern: re.Pattern[str]) -> None:
        self._layout, self._pattern = layout, pattern
        self.world_size = layout.world_size
        names = (spec.name for parameter in layout.parameters(0) for spec, _ in parameter.parts)
        if not any(map(pattern.search, names)):
            raise ConfigError(
                f"--reload {pattern.pattern!r} matches no tensor of engine rank 0. `rdt manifest` lists them."
            )

    def parameters(self, rank: int) -> Iterator[Parameter]:
        """See :class:`rdt_core.models.parameter.Layout`."""
        reloaded: dict[str, TensorSpec] = {}
        for parameter in self._layout.parameters(rank):
            kept = tuple(part for part in parameter.parts if not self._pattern.search(part[0].name))
            taken = [part for part in parameter.parts if self._pattern.search(part[0].name)]
            reloaded |= {spec.name: spec for spec, region in taken if region.num_elements}
            left_out = sum(region.num_elements for _, region in taken)
            dtype = parameter.dtype or parameter.parts[0][0].dtype
            yield replace(parameter, parts=kept, padding=parameter.padding + left_out, dtype=dtype)
        for name, spec in sorted(reloaded.items()):
            yield Parameter(RELOAD_PREFIX + name, whole([spec]))
