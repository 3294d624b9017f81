"""Two uses of a running vLLM on one machine: an RL loop under torchrun, and AReaL's way through a gateway.

    python -m nox -s examples     (or, where everything is installed: python examples/rl/run.py)

Exits with 1 when the reward does not go up, or when trainer and engine do not agree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from areal import run_gateway_use
from engine import vllm_server
from policy import save_policy

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOP_TIMEOUT_S = 500.0
NEEDED_GAIN = 0.2
WORLD_SIZE = 2


@contextlib.contextmanager
def ray_cluster() -> Iterator[str]:
    """A local Ray cluster of this run's own; yields the address that trainers and gateway join."""
    with tempfile.TemporaryDirectory(prefix="rdt", dir="/tmp") as temp_dir:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            namespace="rdt",
            object_store_memory=100 * 2**20,
            _temp_dir=temp_dir,
        )
        try:
            yield str(ray.get_runtime_context().gcs_address)
        finally:
            ray.shutdown()


def run_loop(model: Path, engine: str, folder: Path, num_steps: int) -> list[str]:
    """The RL loop; returns what was not as it should be."""
    out = folder / "rewards.json"
    script = str(Path(__file__).with_name("train.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["--model", str(model), "--engine", engine, "--steps", str(num_steps), "--out", str(out)]
    subprocess.run(
        [*launcher, "--nproc-per-node", str(WORLD_SIZE), script, *arguments],
        check=True,
        timeout=LOOP_TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = json.loads(out.read_text(encoding="utf-8"))
    failures = []
    first, last = rows[0]["reward"], rows[-1]["reward"]
    if last < first + NEEDED_GAIN:
        failures.append(f"the reward went from {first:.3f} to {last:.3f}")
    if not rows[-1]["bytes_equal"]:
        failures.append("bytes in the engine differ from the trainer's")
    return failures


def main() -> int:
    """Run both; 0 when all is as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["loop", "areal", "all"], nargs="?", default="all")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of the loop (default: 12)")
    parser.add_argument("--out", type=Path, default=Path("build/examples"), help="for logs and rewards.json")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    started = time.perf_counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ray_cluster() as address:
        os.environ["RAY_ADDRESS"] = address
        model = save_policy(Path(folder))
        with vllm_server(model, out / "engine.log") as engine:
            print(f"vLLM serves after {time.perf_counter() - started:.0f} s", flush=True)
            if args.what in ("loop", "all"):
                failures += run_loop(model, engine, out, args.steps)
            if args.what in ("areal", "all"):
                failures += run_gateway_use(model, engine, out)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
