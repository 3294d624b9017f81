from __future__ import annotations

import subprocess
import sys

import pytest

PURE = (
    "rdt_core",
    "rdt_core.arena",
    "rdt_core.choice",
    "rdt_core.cli.app",
    "rdt_core.coverage",
    "rdt_core.direct",
    "rdt_core.dtypes",
    "rdt_core.errors",
    "rdt_core.fan_out",
    "rdt_core.layout",
    "rdt_core.lifecycle",
    "rdt_core.link_prices",
    "rdt_core.lowering",
    "rdt_core.manifest",
    "rdt_core.mode",
    "rdt_core.models.preset",
    "rdt_core.models.specs",
    "rdt_core.placement",
    "rdt_core.plan",
    "rdt_core.plan_summary",
    "rdt_core.planner",
    "rdt_core.read_method",
    "rdt_core.recording",
    "rdt_core.region",
    "rdt_core.row_blocks",
    "rdt_core.simulator.predict",
    "rdt_core.sources",
    "rdt_core.transports.pieces",
    "rdt_core.wire",
)
HEAVY = ("torch", "ray", "numpy", "vllm", "sglang", "nixl")


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"
