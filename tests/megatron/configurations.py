"""What is tested: one row a configuration of Megatron-core."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A model and how it is spread over ranks; data parallelism takes the ranks that the rest leaves.

    Args:
        family: key of ``hf_models.BUILDERS``.
        num_ranks: of the world.
        experts: how experts are held: ``sequential``, or ``stacked`` (GroupedMLP, before Megatron 0.17).
        tp, pp, vpp, ep, etp, cp: sizes of the parallel groups.
        sequence_parallel: as Megatron wants it for training experts under tensor parallelism.
        is_tied: whether embedding and output share memory.
        num_kv_heads: key and value heads.
        vocab: rows of the checkpoint's embedding; Megatron's is padded to a multiple of 128 a tp rank.
        first_stage_layers: layers of the first pipeline stage, where stages are uneven.
        distributed_optimizer: whether parameters lie in the optimizer's own buffer.
        overlap_param_gather: whether the gather of parameters is put off to the next forward.
        dtype: of the parameters.
        has_biases: whether every linear layer has a bias.
        float32_routers: whether routers stay in float32 beside bfloat16.
        runs: whether the model can compute here; otherwise it is described and loaded, and no more.
    """

    family: str
    num_ranks: int
    experts: str = "sequential"
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    is_tied: bool = False
    num_kv_heads: int = 4
    vocab: int = 250
    first_stage_layers: int | None = None
    distributed_optimizer: bool = False
    overlap_param_gather: bool = False
    dtype: str = "float32"
    has_biases: bool = False
    float32_routers: bool = False
    runs: bool = True

    @property
    def compares_logits(self) -> bool:
        """Whether both models compute the same to rounding."""
        return self.runs and self.dtype == "float32"

    @property
    def is_direct(self) -> bool:
        """Whether every region lies row by row in the trainer's memory."""
        return self.experts != "stacked"

    @property
    def proof(self) -> str:
        """What the test compares, for the documentation."""
        if self.compares_logits:
            return "logits to 1e-5, before and after 3 steps"
        return "tensors load" + (", views stay live over 3 steps" if self.runs else "; not trained")


def _c(family: str, num_ranks: int, **rest: object) -> Configuration:
    return Configuration(family=family, num_ranks=num_ranks, **rest)  # type: ignore[arg-type]  # checked there


_MOE_TP = {"tp": 2, "ep": 2, "sequence_parallel": True}

CONFIGURATIONS: dict[str, Configuration] = {
    "one rank": _c("qwen3", 1),
    "one rank, biases": _c("llama", 1, has_biases=True),
    "one rank, plain MLP": _c("starcoder2", 1, has_biases=True),
    "one rank, sequential experts": _c("qwen3_moe", 1),
    "one rank, stacked experts": _c("qwen3_moe", 1, experts="stacked"),
    "one rank, distributed optimizer": _c("qwen3", 1, is_tied=True, distributed_optimizer=True),
    "TP2": _c("llama", 2, tp=2),
    "TP2, biases": _c("llama", 2, tp=2, has_biases=True),
    "TP2, qkv biases": _c("qwen2", 2, tp=2, is_tied=True),
    "TP2, one query group": _c("qwen3", 2, tp=2, num_kv_heads=1),
    "TP2, plain MLP": _c("starcoder2", 2, tp=2, has_biases=True),
    "TP2, sequence parallel": _c("qwen3", 2, tp=2, sequence_parallel=True),
    "TP2 x ETP2, MLA": _c("deepseek_v3", 2, tp=2, etp=2, sequence_parallel=True),
    "PP2": _c("qwen3", 2, pp=2),
    "PP2, tied": _c("qwen3", 2, pp=2, is_tied=True),
    "PP2, uneven stages": _c("qwen3", 2, pp=2, first_stage_layers=1),
    "PP2 x VPP2": _c("qwen3", 2, pp=2, vpp=2),
    "DP2": _c("qwen2", 2),
    "DP2, distributed optimizer": _c("qwen3", 2, distributed_optimizer=True),
    "DP2, distributed optimizer, overlapped gather": _c(
        "qwen3", 2, distributed_optimizer=True, overlap_param_gather=True
    ),
    "DP2, bfloat16, float32 routers": _c(
        "deepseek_v3", 2, distributed_optimizer=True, dtype="bfloat16", float32_routers=True
    ),
    # Attention over a sequence that is cut needs Transformer Engine.
    "CP2, distributed optimizer": _c("llama", 2, cp=2, distributed_optimizer=True, runs=False),
    "EP2": _c("qwen3_moe", 2, ep=2),
    "EP2, Mixtral": _c("mixtral", 2, ep=2),
    "EP2, stacked experts": _c("mixtral", 2, ep=2, experts="stacked"),
    "EP2, MLA and shared experts": _c("deepseek_v3", 2, ep=2),
    "EP2, distributed optimizer": _c("qwen3_moe", 2, ep=2, distributed_optimizer=True),
    "TP2 x PP2": _c("llama", 4, tp=2, pp=2),
    "TP2 x PP2, tied": _c("qwen3", 4, tp=2, pp=2, is_tied=True),
    "TP2 x PP2 x VPP2, distributed optimizer": _c(
        "qwen3", 4, tp=2, pp=2, vpp=2, is_tied=True, distributed_optimizer=True
    ),
    "TP2 x DP2, distributed optimizer, overlapped gather": _c(
        "qwen2", 4, tp=2, distributed_optimizer=True, overlap_param_gather=True
    ),
    "TP4, two query groups": _c("qwen3", 4, tp=4, num_kv_heads=2),
    "TP4, ranks of padding": _c("llama", 4, tp=4, vocab=60),
    "TP2 x EP2": _c("qwen3_moe", 4, **_MOE_TP),
    "TP2 x EP2 x ETP2": _c("mixtral", 4, etp=2, **_MOE_TP),
    "TP2 x EP2 x ETP2, stacked experts": _c("mixtral", 4, etp=2, experts="stacked", **_MOE_TP),
    "TP2 x EP2, MLA and shared experts": _c("deepseek_v3", 4, distributed_optimizer=True, **_MOE_TP),
    "PP2 x EP2": _c("qwen3_moe", 4, pp=2, ep=2),
}
