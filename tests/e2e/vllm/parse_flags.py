"""Parses command lines of ``vllm serve`` given on stdin; run as ``python -m tests.e2e.vllm.parse_flags``.

A process of its own, since plugins are loaded once a process and vLLM warns while it is imported. Reads a
JSON object of argument lists by name, ends with one line of JSON: what each became, and what vLLM lost by it.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

UNTOUCHED = (
    "vllm.entrypoints.launchers.app:build_app",
    "vllm.entrypoints.launchers.app:register_api_routers",
    "vllm.model_executor.layers.attention.mla_attention:MLAAttention.process_weights_after_loading",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.apply",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading",
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
    "vllm.model_executor.model_loader.utils:process_weights_after_loading",
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc",
    "vllm.v1.worker.gpu_worker:Worker.load_model",
    "vllm.v1.worker.gpu_worker:Worker.start_weight_update",
)


def find(path: str) -> Any:
    """The object behind ``module:attribute.attribute``."""
    import importlib

    module, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def parse(arguments: list[str]) -> dict[str, Any]:
    """What ``vllm serve`` makes of the arguments: the namespace's part that is ours, or how it ended."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    output = io.StringIO()
    sys.argv = ["vllm", "serve", *arguments]
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            found = parser.parse_args(arguments)
        except SystemExit as end:
            return {"exit": end.code, "output": output.getvalue()}
    transfer = found.weight_transfer_config
    return {
        "exit": None,
        "weight_sync": found.weight_sync,
        "backend": transfer.backend if transfer else None,
        "middleware": found.middleware,
    }


def main() -> None:
    """Parse every line with the plugin loaded by vLLM itself, and see what registering twice changed."""
    before = {path: find(path) for path in UNTOUCHED}
    cases = {name: parse(arguments) for name, arguments in json.load(sys.stdin).items()}
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.engine.arg_utils import EngineArgs

    from rdt_vllm.plugin import register

    once = EngineArgs.add_cli_args
    register()
    report = {
        "cases": cases,
        "changed": [path for path, was in before.items() if find(path) is not was],
        "is_idempotent": EngineArgs.add_cli_args is once,
        "is_offered": "rdt" in WeightTransferEngineFactory._registry,
    }
    print(json.dumps(report))  # noqa: T201  the last line of our output is our answer


if __name__ == "__main__":
    main()
