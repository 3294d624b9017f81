"""Where the console script ``rdt`` begins, with or without what the command line needs."""

from __future__ import annotations

import importlib
import importlib.util
import sys

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line and exit with its code: 0, 1 for an error, 2 for wrong usage."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"rdt needs {' and '.join(missing)}, which this Python does not have; "
            "install them with `pip install 'rdt-core[cli]'`.\n"
        )
        raise SystemExit(1)
    importlib.import_module("rdt_core.cli.app").app()
