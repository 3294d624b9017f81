"""How planning grows: seconds and memory of `rdt simulate` against the bytes that ranks describe.

    python benchmarks/simulator_growth.py --json benchmarks/results/simulator-growth.json \
        --svg docs/images/simulator-growth.svg

Kimi-K2 with its published layouts and from an eighth to twice its layers, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rdt_core.models.config import parse_config
from rdt_core.models.preset import load_preset
from rdt_core.models.specs import ENGINES, TRAINERS, make_engine, make_trainer, parse_spec
from rdt_core.models.units import describe_model
from rdt_core.simulator.topology import Topology
from rdt_core.simulator.traffic import plan_traffic

LAYERS = (8, 16, 32, 64, 96, 128)
NUM_ENGINES = 4
TIMEOUT_S = 300
WIDTH, HEIGHT, MARGIN = 640, 360, 60


def measure(layers: int) -> dict[str, Any]:
    """Plan every engine rank of a model of so many layers, in this process."""
    preset = load_preset("kimi-k2")
    config = {
        "model_type": "kimi_k2", "vocab_size": 163840, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 64,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 384, "n_shared_experts": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    started, cpu = time.perf_counter(), time.process_time()
    model = describe_model(parse_config(config))
    trainer = make_trainer(parse_spec("megatron:tp=8,pp=8,cp=4,ep=32", TRAINERS), model, preset.trainer_ranks)
    engine = make_engine(parse_spec(preset.engine, ENGINES), model)
    traffic = plan_traffic(trainer, engine, NUM_ENGINES, Topology(), has_fan_out=True)
    return {
        "layers": layers,
        "num_engine_ranks": traffic.num_engine_ranks,
        "described_nbytes": sum(traffic.needed.values()),
        "wall_s": round(time.perf_counter() - started, 3),
        "cpu_s": round(time.process_time() - cpu, 3),
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def draw(rows: list[dict[str, Any]]) -> str:
    """CPU seconds against terabytes, as an SVG with the line from zero to the last point."""
    most_tb = max(row["described_nbytes"] for row in rows) / 1e12
    most_s = max(row["cpu_s"] for row in rows)

    def place(row: dict[str, Any]) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * row["described_nbytes"] / 1e12 / most_tb
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * row["cpu_s"] / most_s

    last = place(rows[-1])
    bottom, right = HEIGHT - MARGIN, WIDTH - MARGIN
    points = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#0b5394"/>'
        f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{row["cpu_s"]:.2f} s</text>'
        f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{row["described_nbytes"] / 1e12:.1f}'
        "</text>"
        for row in rows
        for x, y in [place(row)]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" role="img">'
        "<title>CPU seconds of planning against terabytes described</title>"
        "<style>text{font:12px sans-serif;fill:#333}</style>"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
        f'<line x1="{MARGIN}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="#333"/>'
        f'<line x1="{MARGIN}" y1="{MARGIN}" x2="{MARGIN}" y2="{bottom}" stroke="#333"/>'
        f'<line x1="{MARGIN}" y1="{bottom}" x2="{last[0]:.1f}" y2="{last[1]:.1f}" '
        'stroke="#999" stroke-dasharray="4 4"/>'
        f"{points}"
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        "TB that 128 engine ranks describe</text>"
        f'<text x="{MARGIN}" y="{MARGIN - 18}">CPU s; dashed: linear</text></svg>\n'
    )


def main() -> None:
    """Measure every size in a process of its own, print, and write what was asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--svg", type=Path, help="write the plot here")
    parser.add_argument("--layers", type=int, help="measure this size only, in this process")
    args = parser.parse_args()
    if args.layers:
        print(json.dumps(measure(args.layers)))
        return
    rows = []
    for layers in LAYERS:
        command = [sys.executable, __file__, "--layers", str(layers)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        rows.append(json.loads(ran.stdout))
        print(rows[-1])
    if args.json:
        args.json.write_text(json.dumps({"results": rows}, indent=1) + "\n")
    if args.svg:
        args.svg.write_text(draw(rows))


if __name__ == "__main__":
    main()
