"""``rdt trace``: the last completed sync of a group as a file for Perfetto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rdt_core.chrome_trace import make_trace
from rdt_core.cli.output import print_json, print_lines, show_bytes, show_seconds
from rdt_core.errors import ConfigError


def run(
    group: Annotated[str, typer.Argument(help="Name of the sync group.")] = "policy",
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("rdt-trace.json"),
    last: Annotated[  # noqa: FBT002  a flag of the command line; there is nothing else to choose yet
        bool, typer.Option("--last/--no-last", help="The last completed sync, which is the one kept.")
    ] = True,
    as_json: Annotated[  # noqa: FBT002  a flag of the command line
        bool, typer.Option("--json", help="Say what was written as one JSON object.")
    ] = False,
) -> None:
    """Write who read what from whom, and when, in the last completed sync. Open it in ui.perfetto.dev."""
    from rdt_core import ray_session  # noqa: PLC0415  the other commands run without Ray
    from rdt_core.client import CoordinatorClient, RayChannel  # noqa: PLC0415

    del last
    ray_session.join()
    kept = CoordinatorClient(RayChannel.find(group)).history()
    whole = [sync for sync in kept if "ranks" in sync]
    if not whole:
        raise ConfigError(f"group {group!r} has completed no sync yet, so there is nothing to trace.")
    trace = make_trace(whole[-1])
    try:
        out.write_text(json.dumps(trace), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {out}: {error.strerror}. Name a file in a folder that exists."
        ) from error
    sync = whole[-1]
    if as_json:
        written = {key: sync[key] for key in ("version", "nbytes", "total_s", "stall_s")}
        print_json({"file": str(out), "group": group, "num_events": len(trace["traceEvents"]), **written})
    else:
        print_lines(
            f"{out}: version {sync['version']} of {group}, {show_bytes(sync['nbytes'])} in "
            f"{show_seconds(sync['total_s'])}. Open it in https://ui.perfetto.dev or chrome://tracing."
        )
