"""Any chain of views and moves by which a loader takes a tensor apart is followed back to the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.loader_models import Model, each, parameter, randoms
from tests.integration.recorded import record_and_compare

if TYPE_CHECKING:
    from collections.abc import Callable


@st.composite
def view_chains(draw: st.DrawFn) -> tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor], str]:
    """A shape, and a chain of views and moves that takes a tensor of it apart."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    probe = torch.empty(shape, device="meta")
    steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
    told = []
    for _ in range(draw(st.integers(1, 6))):
        text, step = draw(one_step(probe))
        moved = step(probe)
        if moved.numel() == 0:
            continue
        probe = moved
        steps.append(step)
        told.append(text)

    def chain(tensor: torch.Tensor) -> torch.Tensor:
        for step in steps:
            tensor = step(tensor)
        return tensor

    return shape, chain, " ".join(told)


@st.composite
def one_step(draw: st.DrawFn, probe: torch.Tensor) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """One view or move that fits the shape of ``probe``."""
    if probe.dim() == 0:
        return "unsqueeze", lambda t: t.unsqueeze(0)
    dim = draw(st.integers(0, probe.dim() - 1))
    size = probe.shape[dim]
    first = draw(st.integers(0, size - 1))
    length = draw(st.integers(1, size - first))
    order = draw(st.permutations(range(probe.dim())))
    factor = draw(st.sampled_from([f for f in range(1, size + 1) if size % f == 0]))
    step = draw(st.integers(1, 3))
    other = draw(st.integers(0, probe.dim() - 1))
    picks = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    at = (slice(None),) * dim
    table: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        f"narrow({dim},{first},{length})": lambda t: t.narrow(dim, first, length),
        f"permute{tuple(order)}": lambda t: t.permute(order),
        f"transpose({dim},{other})": lambda t: t.transpose(dim, other),
        f"unflatten({dim},{factor})": lambda t: torch.unflatten(t, dim, (factor, size // factor)),
        f"chunk({dim})": lambda t: t.chunk(2, dim)[-1],
        f"unsqueeze({dim})": lambda t: t.unsqueeze(dim),
        "flatten": lambda t: t.flatten(),
        f"flatten({dim})": lambda t: t.flatten(dim),
        f"select({dim},{first})": lambda t: t.select(dim, first),
        f"step({dim},{first},{step})": lambda t: t[(*at, slice(first, None, step))],
        "reshape": lambda t: t.reshape(-1, t.shape[-1]),
        "contiguous": lambda t: t.contiguous(),
        "float": lambda t: t.float(),
        f"cat({dim})": lambda t: torch.cat([t.narrow(dim, first, length), t], dim),
        f"flip({dim})": lambda t: t.flip(dim),
        f"pick({dim},{picks})": lambda t: t.index_select(dim, torch.tensor(picks)),
        "expand": lambda t: t.unsqueeze(0).expand(2, *t.shape),
    }
    name = draw(st.sampled_from(sorted(table)))
    return name, table[name]


@settings(max_examples=300, deadline=None)
@given(view_chains(), st.booleans(), st.data())
def test_any_chain_of_views_and_moves_is_followed_back(
    case: tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor], str],
    is_transposed: bool,
    data: st.DataObject,
) -> None:
    shape, chain, _ = case
    moved = chain(torch.zeros(shape, dtype=torch.bfloat16))
    order = data.draw(st.permutations(range(moved.dim())))

    def load_one(model: Model, name: str, tensor: torch.Tensor) -> None:
        target = model.get_parameter("weight").data
        if is_transposed:
            target.permute(order).copy_(chain(tensor))
        else:
            target.copy_(chain(tensor))

    inverse = sorted(range(moved.dim()), key=lambda dim: order[dim])
    target_shape = tuple(moved.shape[dim] for dim in (inverse if is_transposed else range(moved.dim())))
    model, twin = Model(each(load_one)), Model(each(load_one))
    model.weight, twin.weight = parameter(*target_shape), parameter(*target_shape)
    recording = record_and_compare(model, twin, randoms({"w": shape}))
    assert not recording.reload
    assert sum(shard.region.num_elements for shard in recording.shards) == moved.numel()
