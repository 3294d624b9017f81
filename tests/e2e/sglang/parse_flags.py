"""Parses command lines of an SGLang server given on stdin; run as ``python -m tests.e2e.sglang.parse_flags``.

A process of its own, since plugins are loaded once a process. Reads a JSON object of argument lists, and
writes one line of JSON: what came of each, and what of SGLang had changed before and after.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

MISSING = "--without-hook"


def parse(arguments: list[str]) -> dict[str, Any]:
    from sglang.srt.server_args import prepare_server_args

    from rdt_sglang import compat

    output, status = io.StringIO(), None
    chosen = None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            chosen = compat.is_chosen(prepare_server_args(arguments))
        except SystemExit as ended:
            status = ended.code
    return {"exit": status, "chosen": chosen, "output": output.getvalue()[-4000:]}


def changed() -> list[str]:
    """Which of the places that this adapter hooks differ from SGLang's own."""
    from sglang.srt.managers import io_struct, tokenizer_control_mixin

    places = {
        "init_communicators": hasattr(
            tokenizer_control_mixin.TokenizerControlMixin.init_communicators, "__wrapped__"
        ),
        "communicators": any(s[0] == "weight_sync" for s in tokenizer_control_mixin._COMMUNICATOR_SPECS),
        "messages": any(cls.__module__.startswith("rdt_") for cls in io_struct._all_types),
    }
    return [name for name, is_changed in places.items() if is_changed]


def main() -> None:
    """Parse all, in order; without the hook's place when asked to."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if MISSING in sys.argv:
        from sglang.srt.managers.tokenizer_control_mixin import TokenizerControlMixin

        del TokenizerControlMixin.init_communicators
    cases = json.loads(sys.stdin.read())
    report: dict[str, Any] = {"before": [] if MISSING in sys.argv else changed()}
    report["cases"] = {name: parse(arguments) for name, arguments in cases.items()}
    report["after"] = [] if MISSING in sys.argv else changed()
    print(json.dumps(report))  # noqa: T201  read by the test


if __name__ == "__main__":
    main()
