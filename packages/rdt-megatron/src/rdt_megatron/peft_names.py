"""How PEFT names what it adds to a model: in memory, in an adapter's checkpoint, and in the base model's.

PEFT is never imported: its layers say by ``adapter_layer_names`` where they keep adapters, and that is all
that is needed.

Source: peft 0.21, ``tuners/tuners_utils.py`` (``BaseTunerLayer``, ``_remove_adapter_name_from_key``),
``tuners/lora/model.py`` (``_get_adapter_state_dict``), ``utils/other.py`` (``ModulesToSaveWrapper``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rdt_core.errors import UnsupportedLayoutError
from rdt_megatron.names import strip_wrappers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

_SUPPORTED_TYPE = "LORA"
_SAVED = "modules_to_save"
_ORIGINAL = "original_module"
_BASE = "base_layer"
_IN_FRONT = "base_model.model."  # of a PeftModel over a LoraModel


def adapted_modules(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Every module that PEFT put in place of one, with its name without wrappers."""
    for name, module in modules.items():
        if hasattr(type(module), "adapter_layer_names"):
            yield strip_wrappers(name), module


class AdapterNames:
    """Knows the parameters of one LoRA adapter by name.

    Args:
        modules: of a PeftModel, wrapped or not, by name.
        adapter: the adapter's name in it.
        rank: global trainer rank, for errors.

    Raises:
        UnsupportedLayoutError: there is no such adapter, or it is not LoRA.
    """

    def __init__(self, modules: Mapping[str, nn.Module], adapter: str, rank: int) -> None:
        _check_config(modules, adapter, rank)
        self._checkpoint: dict[str, str] = {}
        self._saved: dict[str, str] = {}
        self._containers: set[str] = set()
        for name, module in adapted_modules(modules):
            for container in module.adapter_layer_names:
                self._add(name, container, adapter)

    def _add(self, module: str, container: str, adapter: str) -> None:
        held = f"{module}.{container}"
        self._containers.add(held)
        if container == _SAVED:
            self._checkpoint[f"{held}.{adapter}"] = self._saved[f"{held}.{adapter}"] = module
            self._containers.add(f"{module}.{_ORIGINAL}")
            return
        self._checkpoint[f"{held}.{adapter}"] = held
        # The checkpoint's format is older than the module that holds DoRA's magnitudes.
        self._checkpoint[f"{module}.lora_magnitude_vector.{adapter}.weight"] = (
            f"{module}.lora_magnitude_vector"
        )

    def in_checkpoint(self, name: str) -> str | None:
        """What a parameter is called in the adapter's checkpoint; None when it is not the adapter's."""
        return _replace_front(name, self._checkpoint)

    def in_merged_model(self, name: str) -> str | None:
        """What a parameter is called in the model without adapters; None when it has no place there."""
        saved = _replace_front(name, self._saved)
        if saved is None and self.holds(name):
            return None
        parts = (saved or name).removeprefix(_IN_FRONT).split(".")
        return ".".join(part for part in parts if part != _BASE)

    def holds(self, name: str) -> bool:
        """Whether a parameter belongs to any adapter, this one or another, or is set aside for one."""
        return any(front in self._containers for front in _fronts(name))


def _fronts(name: str) -> Iterator[str]:
    """The name, and every module that it lies in, from the inside out."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _replace_front(name: str, known: Mapping[str, str]) -> str | None:
    for front in _fronts(name):
        if front in known:
            return known[front] + name[len(front) :]
    return None


def _check_config(modules: Mapping[str, nn.Module], adapter: str, rank: int) -> None:
    configs = next((found for module in modules.values() if (found := _configs_of(module))), {})
    config = configs.get(adapter)
    if config is None:
        reason = f"the model has no adapter of that name, but {', '.join(sorted(configs)) or 'none at all'}"
        raise UnsupportedLayoutError(f"adapter {adapter!r}", rank, reason, "Pass adapter= its name in PEFT.")
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != _SUPPORTED_TYPE:
        raise UnsupportedLayoutError(
            f"adapter {adapter!r}", rank, f"it is of type {kind}", "Only LoRA adapters are exported."
        )


def _configs_of(module: nn.Module) -> dict[str, Any]:
    found = vars(module).get("peft_config")
    return found if isinstance(found, dict) else {}
