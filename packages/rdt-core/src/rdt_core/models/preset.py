"""Published models and layouts by name; one JSON file each in ``presets/``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from rdt_core.errors import ConfigError
from rdt_core.models.config import ModelConfig, parse_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model and how it is trained and served.

    Args:
        name: of the preset.
        source: where the sizes and the layout were published.
        config: of the model.
        trainer, engine: layouts as :func:`rdt_core.models.specs.parse_spec` reads them.
        trainer_ranks, engine_ranks: how many ranks each side has in all.
    """

    name: str
    source: str
    config: ModelConfig
    trainer: str
    engine: str
    trainer_ranks: int
    engine_ranks: int


def list_presets() -> list[str]:
    """Names of all presets."""
    folder = resources.files("rdt_core.models").joinpath("presets")
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def load_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        ConfigError: there is none of that name; the message lists them.
    """
    if name not in list_presets():
        raise ConfigError(f"there is no preset {name!r}. There are {', '.join(list_presets())}.")
    file = resources.files("rdt_core.models").joinpath("presets", f"{name}.json")
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config = parse_config(values.pop("config"), f"preset {name}")
    return Preset(name=name, config=config, **values)
