"""``rdt status`` and ``rdt update``: a look into running sync groups, and one sync by hand."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rdt_core import choice, ray_session, settings
from rdt_core.cli.inputs import JsonOption  # noqa: TC001  typer reads annotations at run time
from rdt_core.cli.output import (
    only_our_output,
    print_json,
    print_lines,
    print_table,
    show_bytes,
    show_seconds,
)
from rdt_core.client import CoordinatorClient, RayChannel, list_groups
from rdt_core.errors import ConfigError, NotPublishedError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHOWN_SYNCS = 5


def status(
    group: Annotated[str | None, typer.Argument(metavar="GROUP", help="Default: all groups.")] = None,
    as_json: JsonOption = False,  # noqa: FBT002  a flag of the command line
) -> None:
    """Show sync groups of the running Ray cluster: trainer ranks, engines, versions, last syncs.

    Joins the cluster of RAY_ADDRESS, or the one on this machine.
    """
    with only_our_output():
        ray_session.join()
        names = list_groups() if group is None else [group]
        found = [_look(name) for name in names]
    if as_json:
        print_json({"groups": found})
        return
    if not found:
        print_lines("No sync group: no trainer has attached (WeightPublisher.attach).")
    for each in found:
        _show_group(each)


def _look(group: str) -> dict[str, Any]:
    client = CoordinatorClient(RayChannel.find(group))
    return {**client.status(), "syncs": client.history()}


def _show_group(found: dict[str, Any]) -> None:
    print_table(
        f"Group {found['group']}: {found['world_size']} trainer ranks",
        ("#trainer rank", "#version", "state", "#last heard of"),
        [
            (rank, row["version"], "alive" if row["alive"] else "silent", show_seconds(row["silent_s"]))
            for rank, row in found["trainers"].items()
        ],
    )
    if found["engines"]:
        print_table(
            "Engines",
            ("engine", "#rank", "#tensors", "#bytes", "reads from", "links"),
            [
                (
                    row["engine"],
                    row["rank"],
                    row.get("num_tensors", ""),
                    show_bytes(row.get("nbytes", 0)),
                    row.get("source", ""),
                    _show_links(row),
                )
                for row in found["engines"]
            ],
        )
    for row in found["engines"]:
        for tensor, reason in row.get("reload", {}).items():
            print_lines(f"rank {row['rank']} of {row['engine']} reloads {tensor}: {reason}")
    if found["syncs"]:
        print_table(
            "Last syncs",
            ("#version", "outcome", "from", "#bytes", "#total", "#stall"),
            [
                (
                    row["version"],
                    row["outcome"] if row["outcome"] == "synced" else row.get("error_type", row["outcome"]),
                    row.get("source", ""),
                    show_bytes(row.get("nbytes", 0)),
                    show_seconds(row.get("total_s", 0.0)),
                    show_seconds(row.get("stall_s", 0.0)),
                )
                for row in found["syncs"][-_SHOWN_SYNCS:]
            ],
        )


def _show_links(engine: Mapping[str, Any]) -> str:
    """Which transports an engine rank reads over, and why: ``4 x nixl (forced)``."""
    reasons = engine.get("reasons", {})
    links = Counter((name, reasons.get(rank, "")) for rank, name in engine.get("trainers", {}).items())
    return ", ".join(f"{count} x {name} ({reason})" for (name, reason), count in sorted(links.items()))


def update(  # noqa: PLR0913, PLR0917  one argument an option of the command line
    group: Annotated[str, typer.Argument(metavar="GROUP", help="Under which trainer ranks attached.")],
    engine: Annotated[
        list[str], typer.Option("--engine", metavar="URL", help="An engine server; give one for each.")
    ],
    version: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Default: what every trainer rank holds."),
    ] = None,
    transport: Annotated[
        str, typer.Option(metavar="NAME", help="Of every link; auto: each chooses.")
    ] = choice.AUTO,
    kv_cache: Annotated[
        str, typer.Option(metavar="WORD", help="recompute, or keep what the old weights left there.")
    ] = "recompute",
    commit_policy: Annotated[
        str, typer.Option(metavar="WORD", help="group: all engines or none; engine: each for itself.")
    ] = "group",
    fan_out: Annotated[
        str,
        typer.Option(metavar="WORD", help="auto, always or never: engines of one node read together."),
    ] = "auto",
    read_share: Annotated[
        float, typer.Option(metavar="X", help="Of the time in which a read moves bytes; below 1 it rests.")
    ] = 1.0,
    has_verify: Annotated[  # noqa: FBT002
        bool, typer.Option("--verify", help="Compare digests of every tensor afterwards.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="S", help="For each phase, in seconds.")
    ] = 120.0,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Connect engines to a group, bring them to a version, and disconnect them.

    For a test or a repair: a training loop keeps a WeightSync. Do not use it on engines that another driver
    holds. An API key of the engines is read from RDT_API_KEY.
    """
    if find_spec("torch") is None:
        raise ConfigError(
            "`rdt update` needs torch, which this Python does not have. Install it, or sync from the driver."
        )
    from rdt_core.sync import WeightSync  # noqa: PLC0415  the other commands run without torch

    key = settings.read_key(settings.API_KEY) or None
    with only_our_output():
        ray_session.join()
        wanted = version or _published_version(group)
        with WeightSync.connect(
            group,
            engine,
            api_key=key,
            transport=transport,
            commit_policy=commit_policy,
            fan_out=fan_out,
            read_share=read_share,
            timeout_s=timeout_s,
        ) as sync:
            report = sync.update(wanted, kv_cache=kv_cache, timeout_s=timeout_s)
            verified = sync.verify() if has_verify else None
    if as_json:
        extra = {} if verified is None else {"bytes_equal": verified.bytes_equal}
        print_json({**report.as_dict(), **extra})
    else:
        print_lines(
            f"version {report.version}: {report.num_tensors} tensors, {show_bytes(report.nbytes)} in "
            f"{show_seconds(report.total_s)} (prepare {show_seconds(report.prepare_s)}, commit "
            f"{show_seconds(report.commit_s)}, stall {show_seconds(report.stall_s)})"
        )
        print_lines(*(f"engine {failure.engine} failed: {failure.message}" for failure in report.failures))
        if verified is not None:
            equal = "every byte is equal" if verified.bytes_equal else "BYTES DIFFER"
            print_lines(f"{verified.num_tensors} tensors compared: {equal}", *verified.mismatched[:5])
    if report.failures or (verified is not None and not verified.bytes_equal):
        raise typer.Exit(1)


def _published_version(group: str) -> int:
    """The version that all trainer ranks hold."""
    trainers = CoordinatorClient(RayChannel.find(group)).status()["trainers"]
    versions = [int(row["version"]) for row in trainers.values()]
    found = min(versions, default=0)
    if not found:
        behind = tuple(int(rank) for rank, row in trainers.items() if not row["version"])
        raise NotPublishedError(1, behind, 0.0)
    return found
