"""The models that benchmarks move: names and shapes as in their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A dense decoder by its config values.

    Args:
        name: as given on the command line.
        vocab, hidden, intermediate, layers, heads, kv_heads, head_dim: as in config.json.
        has_qk_norm: whether every layer has q and k norms (Qwen3).
    """

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    has_qk_norm: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint tensors by name; embeddings are tied."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.self_attn.q_proj.weight": (query, self.hidden),
                f"{prefix}.self_attn.k_proj.weight": (key, self.hidden),
                f"{prefix}.self_attn.v_proj.weight": (key, self.hidden),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden, query),
                f"{prefix}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
            }
            if self.has_qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (self.hidden,)
        return shapes


CASES = {
    case.name: case
    for case in (
        Case(
            name="smollm2",
            vocab=49152,
            hidden=576,
            intermediate=1536,
            layers=30,
            heads=9,
            kv_heads=3,
            head_dim=64,
            has_qk_norm=False,
        ),
        Case(
            name="qwen3-0.6b",
            vocab=151936,
            hidden=1024,
            intermediate=3072,
            layers=28,
            heads=16,
            kv_heads=8,
            head_dim=128,
            has_qk_norm=True,
        ),
    )
}
