"""What is tested of PyTorch's own shardings: one row a configuration, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

from rdt_core.placement import Placement, Replicate, ShardDim


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """One configuration that ranks are tested in.

    Args:
        holds: what a rank exports, in words.
        mesh: ranks along every axis, as a large matrix lies on them.
        placements: one an axis.
        dtype: of the memory that is exported.
        cases: what the ranks run, as ``test_fsdp_exporter.py`` or ``test_lora_exporters.py`` name it.
        proof: what they are compared with.
    """

    holds: str
    cases: tuple[str, ...]
    proof: str
    mesh: tuple[int, ...] = (2,)
    placements: tuple[Placement, ...] = (ShardDim(0),)
    dtype: str = "bfloat16"


GATHERED = "gathered tensors, before and after 3 steps"
LOGITS = f"{GATHERED}; logits"

SHARDINGS: dict[str, Sharding] = {
    "FSDP2, 1-D mesh; uneven rows, empty ranks": Sharding(
        holds="its rows",
        cases=("even_and_uneven_rows", "rebuilt_cases.llama_rebuilt", "rebuilt_cases.tied_qwen3_rebuilt"),
        proof=LOGITS,
    ),
    "HSDP (replicate x shard)": Sharding(
        holds="rows, with replicas that the plan spreads reads over",
        mesh=(2, 2),
        placements=(Replicate(), ShardDim(0)),
        cases=("hsdp", "rebuilt_cases.hsdp_rebuilt"),
        proof=LOGITS,
    ),
    "`shard_placement_fn` with another dim": Sharding(
        holds="column blocks", placements=(ShardDim(1),), cases=("shards_of_dim_one",), proof=GATHERED
    ),
    "FSDP2 x tensor parallel, column-parallel layers; uneven": Sharding(
        holds="the rows that `fully_shard` cut out of its tensor-parallel part",
        mesh=(2, 2),
        placements=(ShardDim(0), ShardDim(0)),
        cases=(
            "tensor_parallel_under_fsdp",
            "uneven_tensor_parallel_under_fsdp",
            "rebuilt_cases.tensor_parallel_under_fsdp_rebuilt",
        ),
        proof="gathered tensors; logits before and after 3 steps",
    ),
    "FSDP2 x tensor parallel, row-parallel layers": Sharding(
        holds="a box of rows and columns",
        mesh=(2, 2),
        placements=(ShardDim(0), ShardDim(1)),
        cases=("tensor_parallel_under_fsdp", "rebuilt_cases.tensor_parallel_under_fsdp_rebuilt"),
        proof="gathered tensors; logits before and after 3 steps",
    ),
    "FSDP2, mixed precision": Sharding(
        holds="the float32 shards", dtype="float32", cases=("mixed_precision",), proof=GATHERED
    ),
    "FSDP2, bfloat16": Sharding(holds="its rows", cases=("bfloat16",), proof="gathered tensors after a step"),
    "FSDP1, `use_orig_params` or not": Sharding(
        holds="its run of elements, up to three boxes of a matrix",
        cases=(
            "flat_cases.flat_parameters",
            "flat_cases.flat_parameters_without_original_ones",
            "rebuilt_cases.flat_rebuilt",
        ),
        proof=LOGITS,
    ),
    "FSDP1 `NO_SHARD`, DDP": Sharding(
        holds="everything, as replicas",
        placements=(Replicate(),),
        cases=("flat_cases.flat_parameters_kept_whole", "distributed_data_parallel"),
        proof=GATHERED,
    ),
    "parameters that FSDP ignores": Sharding(
        holds="everything, as replicas",
        placements=(Replicate(),),
        cases=("ignored_parameters",),
        proof="gathered tensors",
    ),
    "transformers' fused experts, FSDP2": Sharding(
        holds="its experts, one checkpoint tensor each",
        cases=("rebuilt_cases.qwen3_moe_rebuilt", "rebuilt_cases.mixtral_rebuilt"),
        proof="logits before and after 3 steps",
    ),
    "one LoRA adapter; plain, DDP, FSDP2, FSDP1": Sharding(
        holds="its part of the adapter",
        cases=("adapter_in_one_process", "adapter_under_ddp", "adapter_under_fsdp2", "adapter_under_fsdp1"),
        proof="PEFT's own state dict, before and after 3 steps",
    ),
    "a LoRA model merged; plain, FSDP2": Sharding(
        holds="its rows, adapted weights from copies",
        cases=("merged_in_one_process", "merged_under_fsdp2"),
        proof="PEFT's own merge, before and after 3 steps",
    ),
}

REFUSED: dict[str, tuple[str, ...]] = {
    "parameters on the meta device": ("refuses_meta",),
    "memory that has been released": ("refuses_released_memory",),
    "shards offloaded to the CPU (FSDP2 and FSDP1)": (
        "refuses_offloaded_shards",
        "flat_cases.refuses_offloaded_flat_parameters",
    ),
    "integers, 8-bit floats, quantized parameters": ("refuses_integers", "refuses_eight_bit_floats"),
    "placements that leave a rank several separate boxes": ("refuses_separate_runs",),
    "a model with LoRA adapters, by `fsdp_shards`": ("refuses_the_sum",),
    "adapters of PEFT that are not LoRA": ("refuses_other_kinds",),
    "DoRA, merged": ("refuses_to_merge_weight_decomposition",),
    "LoRA under FSDP1, merged": ("refuses_to_merge_flat_parameters",),
}
