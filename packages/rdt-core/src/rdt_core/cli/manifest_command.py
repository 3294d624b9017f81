"""``rdt manifest``: what every rank of a layout would hold, from a config.json alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rdt_core.cli.inputs import (
    EngineOption,
    EnginesOption,
    JsonOption,
    ModelArgument,
    PresetOption,
    Scenario,
    TrainerOption,
    TrainersOption,
    find_scenario,
    manifests_of,
)
from rdt_core.cli.output import print_json, print_lines, print_table, show_bytes
from rdt_core.dtypes import itemsize_bytes

if TYPE_CHECKING:
    from rdt_core.manifest import Manifest
    from rdt_core.models.parameter import Layout

_MAX_ROWS = 40


def run(
    model_config: ModelArgument = None,
    preset: PresetOption = None,
    trainer: TrainerOption = None,
    engine: EngineOption = None,
    trainers: TrainersOption = None,
    engines: EnginesOption = None,
    rank: Annotated[int | None, typer.Option(min=0, help="List every shard of this rank.")] = None,
    as_json: JsonOption = False,  # noqa: FBT002  a flag of the command line
) -> None:
    """Show what each rank holds of a model: no weights, no GPU.

    Without --trainer and --engine: the checkpoint's tensors. With one of them: its ranks. A preset names both
    and shows its trainer; give --engine to see an engine.
    """
    scenario = find_scenario(model_config, preset, trainer, engine, trainers, engines)
    layout = scenario.engine if engine is not None and trainer is None else scenario.trainer
    tensors = list(scenario.model.tensors())
    nbytes = sum(math.prod(spec.shape) * itemsize_bytes(spec.dtype) for spec in tensors)
    head = {"model": scenario.name, "source": scenario.source, "num_tensors": len(tensors), "nbytes": nbytes}
    if not as_json:
        print_lines(f"{scenario.name}: {len(tensors)} tensors, {show_bytes(nbytes)} ({scenario.source})")
    if layout is None:
        _show_tensors(head, scenario, as_json=as_json)
    elif rank is not None:
        _show_rank(head, layout, rank, as_json=as_json)
    else:
        _show_ranks(head, scenario, layout, as_json=as_json)


def _show_tensors(head: dict[str, Any], scenario: Scenario, *, as_json: bool) -> None:
    tensors = list(scenario.model.tensors())
    if as_json:
        rows = [{"name": spec.name, "shape": spec.shape, "dtype": spec.dtype} for spec in tensors]
        print_json({**head, "tensors": rows})
        return
    shown = [(spec.name, "x".join(map(str, spec.shape)), spec.dtype) for spec in tensors[:_MAX_ROWS]]
    print_table("Checkpoint tensors", ("tensor", "#shape", "dtype"), shown)
    _say_what_is_left(len(tensors))


def _show_ranks(head: dict[str, Any], scenario: Scenario, layout: Layout, *, as_json: bool) -> None:
    manifests = manifests_of(layout, prefix=layout.side)
    text = scenario.trainer_spec if layout.side == "trainer" else scenario.engine_spec
    if as_json:
        print_json({**head, "side": layout.side, "layout": text, "ranks": [_row(each) for each in manifests]})
        return
    held = [each.nbytes for each in manifests]
    print_lines(
        f"{layout.side} {text}: {len(held)} ranks, {show_bytes(min(held))} to {show_bytes(max(held))} each"
    )
    rows = [
        (each.rank, len(each.windows), len(each.shards), len(each.tensors), show_bytes(each.nbytes))
        for each in manifests[:_MAX_ROWS]
    ]
    print_table("Ranks", ("#rank", "#windows", "#shards", "#tensors", "#bytes"), rows)
    _say_what_is_left(len(held))


def _row(manifest: Manifest) -> dict[str, Any]:
    return {
        "rank": manifest.rank,
        "num_windows": len(manifest.windows),
        "num_shards": len(manifest.shards),
        "num_tensors": len(manifest.tensors),
        "nbytes": manifest.nbytes,
        "window_nbytes": sum(window.nbytes for window in manifest.windows.values()),
    }


def _show_rank(head: dict[str, Any], layout: Layout, rank: int, *, as_json: bool) -> None:
    if rank >= layout.world_size:
        raise typer.BadParameter(f"--rank {rank} is not one of {layout.world_size} {layout.side} ranks.")
    (manifest,) = [each for each in manifests_of(layout, prefix=layout.side) if each.rank == rank]
    if as_json:
        shards = [
            {
                "tensor": shard.tensor,
                "region": str(shard.region),
                "window": shard.window,
                "offset_bytes": shard.offset_bytes,
                "stride_bytes": shard.stride_bytes,
                "dtype": shard.dtype,
            }
            for shard in manifest.shards
        ]
        print_json({**head, "side": layout.side, **_row(manifest), "shards": shards})
        return
    rows = [(shard.tensor, shard.region, shard.offset_bytes) for shard in manifest.shards[:_MAX_ROWS]]
    title = f"{layout.side} rank {rank}: {len(manifest.shards)} shards, {show_bytes(manifest.nbytes)}"
    print_table(title, ("tensor", "region", "#offset in its window"), rows)
    _say_what_is_left(len(manifest.shards))


def _say_what_is_left(total: int) -> None:
    if total > _MAX_ROWS:
        print_lines(f"... and {total - _MAX_ROWS} more; --json lists all.")
