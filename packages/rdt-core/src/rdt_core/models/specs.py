"""Layouts as users write them: ``megatron:tp=8,pp=8,ep=32``, ``fsdp:dp=64``, ``vllm:tp=16,dp=8``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rdt_core.dtypes import ITEMSIZE_BYTES
from rdt_core.errors import ConfigError
from rdt_core.models.divide import divide
from rdt_core.models.engine import EngineAxes, EngineLayout
from rdt_core.models.fsdp import FsdpAxes, FsdpLayout
from rdt_core.models.megatron import MegatronAxes, MegatronLayout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.models.parameter import Layout
    from rdt_core.models.units import Model

TRAINERS: Mapping[str, tuple[str, ...]] = {
    "megatron": tuple(field.name for field in fields(MegatronAxes)),
    "fsdp": tuple(field.name for field in fields(FsdpAxes)),
}
ENGINES: Mapping[str, tuple[str, ...]] = {
    "vllm": ("tp", "dp", "pp", "ep", "dtype"),
    "sglang": ("tp", "dp", "pp", "ep", "dp_attention", "dtype"),
}
_FLAGS = frozenset({"ep", "dp_attention"})


@dataclass(frozen=True, slots=True)
class LayoutSpec:
    """A parsed layout: its kind and options. A bare option (``ep``) has the value True."""

    kind: str
    options: Mapping[str, int | str | bool]

    def __str__(self) -> str:
        texts = [key if value is True else f"{key}={value}" for key, value in self.options.items()]
        return f"{self.kind}:{','.join(texts)}" if texts else self.kind

    def size(self, key: str, default: int = 1) -> int:
        """An option that is a count."""
        value = self.options.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self} gives {key} no number. Write {key}=N.")
        return value

    def has(self, key: str) -> bool:
        """Whether an option is given and not zero."""
        return bool(self.options.get(key))


def parse_spec(text: str, kinds: Mapping[str, tuple[str, ...]]) -> LayoutSpec:
    """Read ``kind:key=value,...``.

    Raises:
        ConfigError: the kind, a key or a value is unknown; the message lists what is known.
    """
    kind, _, rest = text.partition(":")
    if kind not in kinds:
        raise ConfigError(f"layout {text!r} is of kind {kind!r}, expected one of {', '.join(kinds)}.")
    options: dict[str, int | str | bool] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in kinds[kind] or key in options:
            what = f"gives {key!r} twice" if key in options else f"gives {key!r}, which {kind} does not have"
            raise ConfigError(f"layout {text!r} {what}. It takes {', '.join(kinds[kind])}.")
        options[key] = _parse_value(text, key, equals, value)
    return LayoutSpec(kind, options)


def _parse_value(text: str, key: str, equals: str, value: str) -> int | str | bool:
    if key == "dtype" and value in ITEMSIZE_BYTES:
        return value
    if not equals and key in _FLAGS:
        return True
    if key != "dtype" and value.isdecimal() and (int(value) > 0 or key in ("first", "last")):
        return int(value)
    expected = f"one of {', '.join(ITEMSIZE_BYTES)}" if key == "dtype" else "an integer of 1 or more"
    raise ConfigError(f"layout {text!r} has {key}={value!r}, expected {expected}.")


def make_trainer(spec: LayoutSpec, model: Model, ranks: int | None = None) -> Layout:
    """The trainer's layout, its data-parallel axis stretched to ``ranks`` ranks where dp is not given.

    Raises:
        ConfigError: sizes do not divide, or do not multiply to ``ranks``.
    """
    if spec.kind == "fsdp":
        given = {key: spec.size(key) for key in ("dp", "replicate") if spec.has(key)}
        if ranks and "dp" not in given:
            given["dp"] = divide(ranks, given.get("replicate", 1), "number of trainer ranks", "replicate")
        layout: Layout = FsdpLayout(model, FsdpAxes(**given, dtype=str(spec.options.get("dtype", ""))))
    else:
        sizes = {key: spec.size(key, 0) for key in spec.options}
        axes = MegatronAxes(**sizes)
        if "dp" not in sizes:
            fixed = axes.tp * axes.pp * axes.cp
            # Without a number of ranks: as few replicas as the experts need.
            wanted = ranks or max(fixed, axes.ep * axes.etp * axes.pp)
            sizes["dp"] = divide(wanted, fixed, "number of trainer ranks", "tp*pp*cp")
        layout = MegatronLayout(model, MegatronAxes(**sizes))
    if ranks and layout.world_size != ranks:
        raise ConfigError(
            f"{spec} has {layout.world_size} ranks, expected {ranks}. Leave dp out to have it computed."
        )
    return layout


def make_engine(spec: LayoutSpec, model: Model) -> Layout:
    """The layout of one engine.

    Raises:
        ConfigError: sizes do not divide.
    """
    axes = _vllm_axes(spec) if spec.kind == "vllm" else _sglang_axes(spec)
    return EngineLayout(model, axes)


def _vllm_axes(spec: LayoutSpec) -> EngineAxes:
    """vLLM spreads experts over all tensor- and data-parallel ranks: whole ones with ``ep``, else slices."""
    tp, dp, pp = spec.size("tp"), spec.size("dp"), spec.size("pp")
    ranks = tp * dp
    if spec.has("ep") and spec.options["ep"] not in (True, ranks):
        raise ConfigError(
            f"{spec} has ep={spec.options['ep']}, but vLLM's --enable-expert-parallel spreads experts over "
            f"all tp*dp={ranks} ranks. Write ep without a number."
        )
    ep = ranks if spec.has("ep") else 1
    return EngineAxes(
        tp=tp,
        mlp_tp=tp,
        pp=pp,
        groups=dp,
        ep=ep,
        expert_tp=ranks // ep,
        dtype=str(spec.options.get("dtype", "")),
    )


def _sglang_axes(spec: LayoutSpec) -> EngineAxes:
    """SGLang's tp counts all ranks of a stage; dp makes copies of it, or divides it with dp_attention."""
    tp, dp, pp = spec.size("tp"), spec.size("dp"), spec.size("pp")
    ep = tp if spec.options.get("ep") is True else spec.size("ep")
    expert_tp = divide(tp, ep, "tp", "ep")
    dtype = str(spec.options.get("dtype", ""))
    if spec.has("dp_attention"):
        attention = divide(tp, dp, "tp", "dp")
        return EngineAxes(tp=attention, mlp_tp=tp, pp=pp, groups=dp, ep=ep, expert_tp=expert_tp, dtype=dtype)
    return EngineAxes(tp=tp, mlp_tp=tp, pp=pp, groups=dp, ep=ep, expert_tp=expert_tp, dtype=dtype)
