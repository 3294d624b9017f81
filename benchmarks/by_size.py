"""A benchmark whose every size is measured in a process of its own: its command line and its table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def run_by_size(
    case: str,
    script: str,
    sizes: Sequence[int],
    measure: Callable[[int], dict[str, Any]],
    packages: Sequence[str] = ("rdt-core",),
) -> None:
    """Measure every size and print the table as JSON; with ``--json FILE`` also write it.

    Args:
        case: its name.
        script: the benchmark's ``__file__``, which is started again for every size.
        sizes: what ``measure`` is called with, one a process.
        measure: makes one row.
        packages: whose versions are told beside Python's.
    """
    parser = argparse.ArgumentParser(description=case)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        sys.stdout.write(json.dumps(measure(args.only)))
        return
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    rows = [json.loads(subprocess.check_output([sys.executable, script, "--only", str(n)])) for n in sizes]
    text = json.dumps({"case": case, "machine": machine, "versions": versions, "results": rows}, indent=1)
    if args.json is not None:
        args.json.write_text(text + "\n")
    sys.stdout.write(text + "\n")
