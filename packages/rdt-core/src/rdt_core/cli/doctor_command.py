"""``rdt doctor``: whether weights can sync on this machine, how fast it copies, and what is missing."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path  # noqa: TC003  typer reads annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rdt_core.checks import MISSING, run_checks
from rdt_core.cli.inputs import JsonOption  # noqa: TC001  typer reads annotations at run time
from rdt_core.cli.output import only_our_output, print_json, print_lines, print_table, show_bytes
from rdt_core.errors import ConfigError
from rdt_core.link_speed import measure_speeds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rdt_core.link_speed import LinkSpeed


def run(
    has_speeds: Annotated[  # noqa: FBT002  a flag of the command line
        bool, typer.Option("--speed/--no-speed", help="Measure how fast this machine copies (seconds).")
    ] = True,
    topology_file: Annotated[
        Path | None,
        typer.Option("--topology", metavar="FILE", help="Write measured speeds for `rdt simulate`."),
    ] = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Look whether weights can sync on this machine: packages, Ray, token, transports, measured speeds.

    Ends with code 1 when something is missing that a sync needs.
    """
    console = Console(stderr=True)
    waiting = console.status("looking; Ray and NIXL take some seconds")
    with waiting if console.is_terminal else nullcontext(), only_our_output():
        checks = list(run_checks())
        speeds = measure_speeds() if has_speeds or topology_file else []
    if topology_file is not None:
        write_topology(topology_file, speeds)
    is_well = all(check.state != MISSING for check in checks)
    if as_json:
        rows = [asdict(check) for check in checks]
        print_json({"ok": is_well, "checks": rows, "speeds": [asdict(speed) for speed in speeds]})
    else:
        print_table(
            "This machine",
            ("", "state", "found", "what helps"),
            [(check.name, check.state, check.detail, check.remedy) for check in checks],
        )
        if speeds:
            print_table("Measured", ("copy", "#speed", "how"), map(_row, speeds))
        if topology_file is not None:
            print_lines(f"topology: {topology_file}")
        print_lines(
            "Nothing that a sync needs is missing." if is_well else "Something that a sync needs is missing."
        )
    raise typer.Exit(0 if is_well else 1)


def _row(speed: LinkSpeed) -> tuple[str, str, str]:
    shown = f"{show_bytes(speed.bytes_per_s)}/s" if speed.bytes_per_s else "not measured"
    return speed.name, shown, speed.detail


def write_topology(path: Path, speeds: Iterable[LinkSpeed]) -> None:
    """One node as measured, with trainers and engines on it.

    Raises:
        ConfigError: a speed is missing, or the file cannot be written.
    """
    found = {speed.name: speed.bytes_per_s for speed in speeds if speed.bytes_per_s}
    on_gpu = "copy on GPU 0" in found
    copy = found.get("copy on GPU 0" if on_gpu else "copy in one process")
    local = found.get("copy from GPU 0 to GPU 1", copy) if on_gpu else found.get("read another process")
    if copy is None or local is None:
        raise ConfigError("the speeds that a topology needs could not be measured. See `rdt doctor`.")
    lines = [
        "# Measured by `rdt doctor --topology` on this machine.",
        "is_colocated = true",
        f"gpus_per_node = {max(2, os.cpu_count() or 2)}",
        "nics_per_node = 1",
        f"gpu_memory_bytes = {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')}",
        "# A copy reads and writes every byte.",
        f"copy_bytes_per_s = {2 * copy:.4g}",
        f"local_bytes_per_s = {local:.4g}",
    ]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}. Name a file in a folder that exists."
        ) from error
