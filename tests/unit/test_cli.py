"""The command line as its users see it: what it prints, to where, and with which exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip(
    "typer", reason="the command line is an extra of rdt-core, and typer is not installed here"
)

from typer.testing import CliRunner

from rdt_core.cli.app import app

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path / "config.json")


def run(*arguments: str, code: int = 0) -> str:
    """Standard output of a command that must end with ``code``; standard error is added for failures."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def read_json(*arguments: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return values


def test_manifest_lists_a_checkpoints_tensors(config: str) -> None:
    values = read_json("manifest", config)
    assert values["num_tensors"] == len(values["tensors"]) == 21
    assert values["tensors"][0] == {
        "name": "model.embed_tokens.weight",
        "shape": [128, 32],
        "dtype": "bfloat16",
    }
    assert "model.embed_tokens.weight" in run("manifest", config)


def test_manifest_shows_the_ranks_of_a_trainer_and_of_an_engine(config: str) -> None:
    trainer = read_json("manifest", config, "--trainer", "fsdp:dp=4")
    engine = read_json("manifest", config, "--engine", "sglang:tp=2")
    assert (trainer["side"], len(trainer["ranks"])) == ("trainer", 4)
    assert (engine["side"], len(engine["ranks"])) == ("engine", 2)
    assert sum(rank["nbytes"] for rank in trainer["ranks"]) == trainer["nbytes"]


def test_manifest_lists_the_shards_of_one_rank(config: str) -> None:
    values = read_json("manifest", config, "--engine", "vllm:tp=2", "--rank", "1")
    keys = [s for s in values["shards"] if s["tensor"] == "model.layers.1.self_attn.k_proj.weight"]
    assert [key["region"] for key in keys] == ["[8:16, 0:32]"]
    assert keys[0]["window"] == "model.layers.1.self_attn.qkv_proj.weight"


def test_plan_reports_bytes_ways_and_balance(config: str) -> None:
    values = read_json("plan", config, "--trainer", "fsdp:dp=2,dtype=float32", "--engine", "vllm:tp=2")
    assert len(values["ranks"]) == 2
    assert sum(values["trainer_egress_nbytes"]) == sum(rank["read_nbytes"] for rank in values["ranks"])
    assert sum(way["nbytes"] for way in values["ways"].values()) == sum(r["nbytes"] for r in values["ranks"])
    # Two float32 ranks for a bfloat16 engine: the trainer narrows what it pays to narrow.
    assert all(way["meaning"] and ": " in way["example"] for way in values["ways"].values())
    shown = run("plan", config, "--trainer", "fsdp:dp=2", "--engine", "vllm:tp=2")
    assert "How bytes land" in shown


def test_plan_reads_columns_as_the_transport_takes_them(config: str) -> None:
    layouts = ("--trainer", "fsdp:dp=2", "--engine", "vllm:tp=2")
    by_nixl = read_json("plan", config, *layouts)
    by_ipc = read_json("plan", config, *layouts, "--transport", "cuda_ipc")
    assert by_nixl["ways"].keys() == {"direct", "packed"}
    assert by_ipc["ways"].keys() == {"direct", "rows"}
    assert any(rank["arena_nbytes"] for rank in by_nixl["ranks"])
    assert not any(rank["arena_nbytes"] for rank in by_ipc["ranks"])
    assert "Use one of" in run("plan", config, *layouts, "--transport", "pigeon", code=2)


def test_plan_shows_what_goes_through_the_engines_own_loader_whole_and_why(config: str) -> None:
    layouts = ("--trainer", "fsdp:dp=2", "--engine", "vllm:tp=2")
    plain = read_json("plan", config, *layouts)
    values = read_json("plan", config, *layouts, "--reload", r"\.down_proj\.")
    way = values["ways"]["reload"]
    assert way["num_tensors"] == 2
    assert ".down_proj." in way["example"]
    assert "cannot be replayed" in way["example"]
    for before, after in zip(plain["ranks"], values["ranks"], strict=True):
        # Every rank takes it whole, where it needs half of it for its own parameters.
        more = after["nbytes"] - before["nbytes"]
        assert more == way["nbytes"] / 4
        assert after["parameter_nbytes"] == before["parameter_nbytes"]
        assert after["landing_nbytes"] >= before["landing_nbytes"] + more + way["nbytes"] / 2
    assert "matches no tensor" in run("plan", config, *layouts, "--reload", "nothing", code=1)
    assert "no regular expression" in run("plan", config, *layouts, "--reload", "(", code=2)


def test_plan_writes_a_heat_map_of_every_pair_that_meets(config: str, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    run("plan", config, "--trainer", "fsdp:dp=2", "--engine", "vllm:tp=2", "--html", str(page))
    assert page.read_text().count("<rect") == 4
    assert "engine rank 1 reads" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("manifest",), "MODEL_CONFIG or --preset"),
        (("manifest", "--preset", "qwen3-0.6b", "config.json"), "MODEL_CONFIG or --preset"),
        (("manifest", "--preset", "qwen3-0.6b", "--trainer", "megatron:xp=2"), "It takes tp"),
        (("manifest", "--preset", "qwen3-0.6b", "--rank", "9"), "--rank 9"),
        (("plan", "--preset", "qwen3-0.6b", "--rank", "1"), "--rank 1"),
        (
            (
                "plan",
                "--nonsense",
            ),
            "--nonsense",
        ),
        (("nonsense",), "nonsense"),
    ],
)
def test_wrong_usage_ends_with_code_2_and_names_the_option(
    arguments: tuple[str, ...], complaint: str
) -> None:
    assert complaint in " ".join(run(*arguments, code=2).replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("manifest", "--preset", "gpt-5"), "there is no preset 'gpt-5'"),
        (("manifest", "missing.json"), "cannot read missing.json"),
        (("plan", "--preset", "qwen3-0.6b", "--engine", "vllm:tp=3"), "does not divide by tp=3"),
    ],
)
def test_an_error_is_one_line_and_ends_with_code_1(arguments: tuple[str, ...], complaint: str) -> None:
    shown = run(*arguments, code=1)
    assert shown.startswith("error: ")
    assert complaint in shown
    assert shown.count("\n") == 1


def test_without_the_extra_one_sentence_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'typer' else find(name)\n"
        "from rdt_core.cli.entry import main; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines() == [
        "rdt needs typer, which this Python does not have; install them with `pip install 'rdt-core[cli]'`."
    ]


def test_the_version_is_printed() -> None:
    assert run("--version").startswith("rdt 0.")


def test_simulate_predicts_phases_and_compares_layouts(config: str, tmp_path: Path) -> None:
    topology = tmp_path / "topology.toml"
    topology.write_text("gpus_per_node = 4\nnics_per_node = 1\n")
    arguments = ["simulate", config, "--trainer", "fsdp:dp=2", "--engine", "vllm:tp=2", "--engines", "4"]
    arguments += ["--topology", str(topology), "--compare", "vllm:tp=4", "--compare", "megatron:tp=2"]
    values = read_json(*arguments)
    assert values["topology"]["nics_per_node"] == 1
    assert [row["rank"] for row in values["engine_ranks"]] == [0, 1, 2, 3]
    assert [case["layout"] for case in values["others"]] == [
        "as asked, no fan-out",
        "vllm:tp=4",
        "megatron:tp=2",
    ]
    phases = [
        values["prediction"][f"{name}_s"] for name in ("publish", "read", "fan_out", "commit", "coordination")
    ]
    assert values["prediction"]["total_s"] == pytest.approx(sum(phases))
    shown = run(*arguments)
    assert "the bottleneck" in shown
    assert "What else" in shown


def test_simulate_refuses_an_unknown_mode_and_engines_that_do_not_fit() -> None:
    assert "auto, staged, inplace" in run("simulate", "--preset", "qwen3-0.6b", "--mode", "fast", code=2)
    shown = run("simulate", "--preset", "qwen3-0.6b", "--engine", "vllm:tp=2", "--engines", "3", code=1)
    assert "does not divide" in shown


def run_doctor(*arguments: str, **env: str) -> tuple[int, dict[str, Any]]:
    """In a process of its own: looking for transports loads what others must not find loaded."""
    code = "from rdt_core.cli.entry import main; main()"
    command = [sys.executable, "-c", code, "doctor", "--json", *arguments]
    # Nothing listens at port 1, so that no cluster of this machine is joined.
    where = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", **env}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=where)
    return ran.returncode, json.loads(ran.stdout)


def test_doctor_measures_this_machine_and_writes_a_topology_that_simulate_takes(
    config: str, tmp_path: Path
) -> None:
    file = tmp_path / "topology.toml"
    code, found = run_doctor("--topology", str(file))
    has_ray_nixl_torch = all(importlib.util.find_spec(name) for name in ("ray", "nixl", "torch"))
    assert (code, found["ok"]) == ((0, True) if has_ray_nixl_torch else (1, False))
    speeds = {speed["name"]: speed["bytes_per_s"] for speed in found["speeds"]}
    assert speeds["copy in one process"] > 1e6
    values = read_json(
        "simulate", config, "--trainer", "fsdp:dp=1", "--engine", "vllm", "--topology", str(file)
    )
    assert values["prediction"]["bottleneck"] == "inside a node"


def test_doctor_names_what_is_missing_and_the_command_that_helps(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-token")
    code, found = run_doctor(
        "--no-speed", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=missing, RAY_AUTH_TOKEN=""
    )
    checks = {check["name"]: check for check in found["checks"]}
    assert code == 1
    assert checks["ray token"]["state"] == "missing"
    assert missing in checks["ray token"]["detail"]
    assert checks["ray token"]["remedy"].startswith("ray get-auth-token")
    assert found["speeds"] == []
    assert all(check["remedy"] for check in found["checks"] if check["state"] == "missing")
