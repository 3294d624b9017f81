"""What the last recorded run of every cell measured: results.json, which docs/reliability.md shows."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = Path(__file__).parent / "results.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell as it was played.

    Args:
        sees: the error that the user got, by the type of its reason; empty for none.
        seconds: from the harm until the user had an answer.
        serves: what the engines that live served then.
        repair_s: until every engine served the next version, once the repair began.
    """

    sees: str
    seconds: float
    serves: str
    repair_s: float = 0.0


@dataclass(slots=True)
class Recorder:
    """Rows of this run, written after every cell, so that a run that is ended keeps what it has.

    Args:
        is_wanted: whether to write at all.
    """

    is_wanted: bool
    _rows: dict[str, Row] = field(default_factory=dict)
    _run: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))

    def keep(self, name: str, row: Row) -> None:
        """One more cell has been played."""
        self._rows[name] = row
        if self.is_wanted:
            self._write()

    def _write(self) -> None:
        kept = read()
        kept["runs"][self._run] = describe_run()
        for name, row in self._rows.items():
            rounded = {**asdict(row), "seconds": round(row.seconds, 1), "repair_s": round(row.repair_s, 1)}
            kept["rows"][name] = {**rounded, "run": self._run}
        used = {row["run"] for row in kept["rows"].values()}
        kept["runs"] = {run: how for run, how in kept["runs"].items() if run in used}
        text = json.dumps(kept, indent=1, sort_keys=True) + "\n"
        FILE.with_suffix(".new").write_text(text, encoding="utf-8")
        FILE.with_suffix(".new").replace(FILE)


def read() -> dict[str, Any]:
    """``runs`` by name, and ``rows`` by cell, each with the run that made it."""
    if not FILE.exists():
        return {"runs": {}, "rows": {}}
    kept: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return kept


def table(runs: Mapping[str, Mapping[str, str]]) -> str:
    """The runs in Markdown."""
    lines = ["| run | command | machine | versions |", "|---|---|---|---|"]
    lines += [
        f"| {run} | `{how['command']}` | {how['machine']} | {how['versions']} |"
        for run, how in sorted(runs.items())
    ]
    return "\n".join(lines)


def describe_run() -> dict[str, str]:
    """What a figure depends on."""
    there = {name.lower() for name in metadata.packages_distributions()}
    named = ("ray", "nixl", "torch", *(engine for engine in ("vllm", "sglang") if engine in there))
    versions = {name: metadata.version(name) for name in named}
    return {
        "command": " ".join(["pytest", *(word for word in sys.argv[1:] if not word.startswith("/"))]),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
