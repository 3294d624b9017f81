"""An ``sglang.Engine`` in this process.

Run as ``python -m tests.e2e.sglang.engine_process MODEL GROUP RAY_ADDRESS RAY_AUTH_MODE``. Reads a version
from every line of stdin, updates to it, and answers with a line of JSON: what the update returned, the
engine's status and its greedy answers. The first line of output is what it answered before.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.e2e.sglang.asking import NUM_TOKENS, PROMPTS

PREFIX = "engine: "


def main() -> None:
    """Serve until stdin ends."""
    import sglang

    model, group, ray_address, ray_auth_mode = sys.argv[1:]
    engine = sglang.Engine(
        model_path=model,
        weight_sync="rdt",
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        cuda_graph_backend_decode="disabled",
        cuda_graph_backend_prefill="disabled",
        mem_fraction_static=0.5,
        max_total_tokens=4096,
    )
    answer(engine, {})
    for line in sys.stdin:
        where = {"ray_address": ray_address, "ray_auth_mode": ray_auth_mode}
        answer(engine, engine.update_weights_from_rdt(group, int(line), **where))
    engine.rdt_disconnect()
    engine.shutdown()


def answer(engine: Any, updated: dict[str, Any]) -> None:
    sampling = {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    outputs = engine.generate(input_ids=[list(prompt) for prompt in PROMPTS], sampling_params=sampling)
    seen = {
        "updated": updated,
        "status": engine.rdt_status(),
        "answers": [output["output_ids"] for output in outputs],
        "versions": [output["meta_info"]["weight_version"] for output in outputs],
    }
    print(PREFIX + json.dumps(seen), flush=True)  # noqa: T201  read by the test


if __name__ == "__main__":
    main()
