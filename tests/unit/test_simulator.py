"""The simulator against the real planner, and against what it promises of every plan."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rdt_core.errors import ConfigError, CoverageError, UnknownTensorError
from rdt_core.models.config import parse_config
from rdt_core.models.parameter import Parameter, build_manifest
from rdt_core.models.preset import load_preset
from rdt_core.models.specs import ENGINES, TRAINERS, make_engine, make_trainer, parse_spec
from rdt_core.models.units import describe_model
from rdt_core.planner import build_plan_from
from rdt_core.read_method import ReadCost
from rdt_core.simulator.predict import Prediction, predict
from rdt_core.simulator.topology import Topology, load_topology
from rdt_core.simulator.traffic import Traffic, plan_traffic
from rdt_core.sources import SourceIndex
from tests.unit.test_models import CONFIGS, MOE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rdt_core.models.parameter import Layout

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SMALL_NODES = Topology(gpus_per_node=4, nics_per_node=4)
CASES = [
    ("dense", "megatron:tp=2,pp=2", "vllm:tp=4"),
    ("dense", "fsdp:dp=3", "vllm:tp=2"),
    ("biased", "fsdp:dp=2,replicate=3", "sglang:tp=4"),
    ("moe", "megatron:tp=2,ep=4,dp=2", "vllm:tp=2,dp=2,ep"),
    ("moe", "megatron:ep=2", "vllm:dp=4,ep"),
    ("latent", "megatron:pp=2,ep=8", "sglang:tp=4,ep=2"),
    ("latent", "megatron:tp=4,ep=2,etp=2", "vllm:tp=8"),
]


def layouts(config: dict[str, Any], trainer: str, engine: str) -> tuple[Layout, Layout]:
    model = describe_model(parse_config(config))
    return make_trainer(parse_spec(trainer, TRAINERS), model), make_engine(parse_spec(engine, ENGINES), model)


def traffic_of_preset(name: str, *, has_fan_out: bool = True) -> tuple[Traffic, Topology]:
    preset, topology = load_preset(name), Topology()
    model = describe_model(preset.config)
    trainer = make_trainer(parse_spec(preset.trainer, TRAINERS), model, preset.trainer_ranks)
    engine = make_engine(parse_spec(preset.engine, ENGINES), model)
    num_engines = preset.engine_ranks // engine.world_size
    return plan_traffic(trainer, engine, num_engines, topology, has_fan_out=has_fan_out), topology


@pytest.mark.parametrize(("config", "trainer", "engine"), CASES)
def test_every_rank_needs_and_receives_what_the_real_planner_reads_for_it(
    config: str, trainer: str, engine: str
) -> None:
    held, served = layouts(CONFIGS[config], trainer, engine)
    sources = SourceIndex([build_manifest(held, rank, f"t{rank}") for rank in range(held.world_size)])
    traffic = plan_traffic(held, served, 2, SMALL_NODES, has_fan_out=False)
    for rank in range(served.world_size):
        manifest = build_manifest(served, rank, f"e{rank}")
        plan = build_plan_from(manifest, sources, cost=ReadCost(per_read_s=0))
        for engine_rank in (rank, served.world_size + rank):
            assert traffic.landed[engine_rank] == plan.payload_nbytes
            assert traffic.nic_in[engine_rank] == plan.payload_nbytes
            assert traffic.needed[engine_rank] == sum(shard.nbytes for shard in manifest.shards)


@pytest.mark.parametrize(("config", "trainer", "engine"), CASES)
def test_with_fan_out_each_nodes_nics_are_crossed_once(config: str, trainer: str, engine: str) -> None:
    held, served = layouts(CONFIGS[config], trainer, engine)
    topology = Topology(gpus_per_node=8, nics_per_node=8)
    traffic = plan_traffic(held, served, 3, topology, has_fan_out=True)
    assert traffic.node_in(topology) == traffic.node_distinct
    assert sum(traffic.fan_in.values()) == sum(traffic.fan_out.values())
    for rank in range(traffic.num_engine_ranks):
        assert traffic.nic_in[rank] + traffic.fan_in[rank] == traffic.landed[rank]


def test_what_lies_on_the_engines_own_node_is_read_there() -> None:
    held, served = layouts(CONFIGS["dense"], "fsdp:dp=1", "vllm")
    topology = Topology(gpus_per_node=2, nics_per_node=1, is_colocated=True)
    traffic = plan_traffic(held, served, 1, topology, has_fan_out=True)
    assert not traffic.nic_in
    assert traffic.local_in[0] == traffic.landed[0]
    assert predict(traffic, topology).bottleneck == "inside a node"


def test_float32_shards_are_laid_out_for_a_bfloat16_engine_once_however_many_read_them() -> None:
    held, served = layouts(CONFIGS["dense"], "fsdp:dp=2,dtype=float32", "vllm")
    one = plan_traffic(held, served, 1, SMALL_NODES, has_fan_out=False)
    many = plan_traffic(held, served, 3, SMALL_NODES, has_fan_out=False)
    assert one.arena == many.arena
    assert one.arena[0] == pytest.approx(3 * one.pairs[0][0])
    assert one.landed[0] == one.needed[0]


class Partial:
    """A trainer that lacks the last row, or the whole, of its one tensor."""

    side = "trainer"
    world_size = 1

    def __init__(self, of: Layout, *, keeps: bool) -> None:
        self._of, self._keeps = of, keeps

    def parameters(self, rank: int) -> Iterator[Parameter]:
        for parameter in self._of.parameters(rank):
            if parameter.name != "model.norm.weight":
                yield parameter
            elif self._keeps:
                spec, region = parameter.parts[0]
                yield Parameter(parameter.name, ((spec, type(region)((0,), (region.stop[0] - 1,))),))


def test_what_no_trainer_rank_holds_is_named() -> None:
    held, served = layouts(CONFIGS["dense"], "fsdp:dp=1", "vllm")
    with pytest.raises(CoverageError, match=r"model\.norm\.weight"):
        plan_traffic(Partial(held, keeps=True), served, 1, SMALL_NODES, has_fan_out=True)
    with pytest.raises(UnknownTensorError, match=r"model\.norm\.weight"):
        plan_traffic(Partial(held, keeps=False), served, 1, SMALL_NODES, has_fan_out=True)


def test_replicas_even_out_the_egress() -> None:
    held, served = layouts(MOE, "fsdp:dp=2,replicate=8", "vllm:tp=2")
    traffic = plan_traffic(held, served, 8, SMALL_NODES, has_fan_out=False)
    egress = traffic.egress()
    assert max(egress) * len(egress) <= 1.1 * sum(egress)


def test_kimi_k2_is_planned_as_promised() -> None:
    traffic, topology = traffic_of_preset("kimi-k2")
    found = predict(traffic, topology)
    assert (traffic.num_trainers, traffic.num_engine_ranks) == (256, 128)
    assert len(traffic.pairs) == 128
    assert traffic.node_in(topology) == traffic.node_distinct
    assert found.trainer_imbalance < 0.10
    assert found.bottleneck == "engine NIC"
    assert found.limit_s < found.read_s < found.total_s < 1.5
    assert found.mode == "inplace"


def test_reading_per_rank_costs_what_fan_out_saves() -> None:
    shared, topology = traffic_of_preset("qwen3-30b-a3b")
    alone, _ = traffic_of_preset("qwen3-30b-a3b", has_fan_out=False)
    assert sum(alone.nic_in.values()) == sum(alone.landed.values())
    # Four engines of two ranks share a node.
    assert sum(alone.nic_in.values()) > 3.9 * sum(shared.nic_in.values())
    assert predict(alone, topology).read_s > 2 * predict(shared, topology).read_s


def test_the_same_question_has_the_same_answer() -> None:
    first, second = (traffic_of_preset("qwen3-0.6b")[0] for _ in range(2))
    assert first == second


def make_traffic(**bytes_by_rank: dict[int, int]) -> Traffic:
    traffic = Traffic(2, 2)
    for name, held in bytes_by_rank.items():
        setattr(traffic, name, Counter(held))
    return traffic


def test_phases_follow_from_bytes_and_speeds() -> None:
    topology = Topology(
        gpus_per_node=1,
        nics_per_node=1,
        nic_gbits_per_s=80,
        nic_efficiency=0.5,
        local_bytes_per_s=1e9,
        copy_bytes_per_s=4e9,
        per_read_s=0.001,
        publish_s=0.01,
        prepare_s=0.02,
        commit_s=0.03,
        coordination_s=0.04,
    )
    traffic = make_traffic(
        needed={0: 10**9}, landed={0: 10**9}, nic_in={0: 10**9}, nic_out={0: 5 * 10**8}, num_reads={0: 100},
        fan_in={1: 10**8}, fan_out={0: 10**8}, arena={1: 4 * 10**8},
    )  # fmt: skip
    found = predict(traffic, topology, mode="staged")
    assert found.links == {"engine NIC": 0.2, "trainer NIC": 0.1, "inside a node": 0.0}
    assert found.read_s == pytest.approx(0.02 + 0.2 + 0.1)
    assert found.fan_out_s == pytest.approx(0.1)
    assert found.publish_s == pytest.approx(0.01 + 0.1)
    assert found.commit_s == pytest.approx(0.03 + 0.5)
    assert found.stall_s == found.commit_s
    assert found.total_s == pytest.approx(0.11 + 0.32 + 0.1 + 0.53 + 0.04)
    assert predict(traffic, topology, mode="inplace").stall_s == pytest.approx(0.32 + 0.1 + 0.03)


def measured(name: str) -> tuple[int, dict[tuple[str, str], float]]:
    """Bytes and median seconds by path and phase of a benchmark's committed result."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    rows = {(row["path"], row["phase"]): row["median_ms"] / 1e3 for row in result["results"]}
    return result["nbytes"], rows


def predicted(preset: str, topology: Topology) -> Prediction:
    model = describe_model(load_preset(preset).config)
    held = make_trainer(parse_spec("fsdp:dp=1", TRAINERS), model)
    served = make_engine(parse_spec("vllm", ENGINES), model)
    return predict(plan_traffic(held, served, 1, topology, has_fan_out=True), topology, mode="staged")


def test_a_measured_sync_on_one_gpu_is_predicted_within_a_quarter() -> None:
    """From the speeds of copies that the same run measured; no number of a sync goes in."""
    nbytes, rows = measured("qwen3-0.6b-h100")
    topology = Topology(
        is_colocated=True,
        copy_bytes_per_s=2 * nbytes / rows["copy_in_process", "end_to_end"],
        local_bytes_per_s=nbytes / rows["ipc_foreach", "end_to_end"],
    )
    found = predicted("qwen3-0.6b", topology)
    assert found.links["inside a node"] == pytest.approx(rows["ours", "read"], rel=0.25)
    copied_s = found.commit_s - topology.commit_s
    assert copied_s == pytest.approx(rows["ours", "commit"], rel=0.25)
    # Requests, version checks and the driver's calls: less than what the topology allows for by default.
    assert rows["ours", "end_to_end"] < found.total_s


def test_a_measured_commit_on_a_cpu_is_predicted_within_a_quarter() -> None:
    nbytes, rows = measured("smollm2-cpu-xeon")
    seconds = rows["copy_in_process", "end_to_end"]
    # Landing memory and parameters are as large as the payload: every byte is read once and written once.
    traffic = make_traffic(needed={0: nbytes}, landed={0: nbytes})
    found = predict(traffic, Topology(copy_bytes_per_s=2 * nbytes / seconds), mode="staged")
    assert found.commit_s == pytest.approx(rows["ours", "commit"], rel=0.25)


def test_measured_updates_on_a_cpu_are_predicted_within_a_quarter() -> None:
    """Read, commit and whole update of two models; ``benchmarks/simulator_check.py`` says what goes in."""
    cases = json.loads((RESULTS / "simulator-cpu.json").read_text())["cases"]
    assert {row["case"] for row in cases} == {"smollm2", "qwen3-0.6b"}
    for row in cases:
        assert set(row["predicted_over_measured"]) == {"prepare", "commit", "total"}
        for phase, ratio in row["predicted_over_measured"].items():
            assert ratio == pytest.approx(1, abs=0.25), (row["case"], phase)


def test_ranks_that_share_a_nic_wait_for_each_other() -> None:
    traffic = make_traffic(nic_in={0: 10**9, 1: 10**9}, nic_out={0: 1})
    alone = Topology(gpus_per_node=2, nics_per_node=2)
    shared = Topology(gpus_per_node=2, nics_per_node=1)
    assert predict(traffic, shared).links["engine NIC"] == 2 * predict(traffic, alone).links["engine NIC"]


def test_a_fabric_that_is_too_narrow_is_the_bottleneck() -> None:
    traffic = make_traffic(nic_in={0: 10**9, 1: 10**9}, nic_out={0: 10**9, 1: 10**9})
    assert predict(traffic, Topology(fabric_gbits_per_s=100)).bottleneck == "fabric"


def test_a_topology_file_sets_speeds_by_name(tmp_path: Path) -> None:
    file = tmp_path / "topology.toml"
    file.write_text("nic_gbits_per_s = 200\nis_colocated = true\n")
    assert load_topology(file) == Topology(nic_gbits_per_s=200, is_colocated=True)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("nic = 1", "Known are gpus_per_node"),
        ("nic_gbits_per_s = 'fast'", "a value like 400"),
        ("gpus_per_node = true", "a value like 8"),
        ("nic_gbits_per_s = 0", "above 0"),
        ("nic_efficiency = 1.5", "at most 1"),
        ("= 1", "is not TOML"),
    ],
)
def test_a_topology_that_cannot_be_used_says_which_value(
    tmp_path: Path, content: str, complaint: str
) -> None:
    file = tmp_path / "topology.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        load_topology(file)
