"""The tables of model families, one module each, and how one is found.

A module here whose ``FAMILY`` names a model type serves it. Other packages offer theirs by an entry point of
group ``rdt_megatron.families``: its name is the model type, its object a ``Family``.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from rdt_megatron.rules import Family

if TYPE_CHECKING:
    from collections.abc import Mapping

ENTRY_POINTS = "rdt_megatron.families"


class UnknownModelTypeError(LookupError):
    """No table serves a model type. Raised to the exporter, which knows the rank."""


def find_family(model_type: str) -> Family:
    """The family that serves a checkpoint's ``model_type``; entry points come before our own.

    Raises:
        UnknownModelTypeError: there is none.
    """
    for point in entry_points(group=ENTRY_POINTS, name=model_type):
        family = point.load()
        if not isinstance(family, Family):
            raise UnknownModelTypeError(f"entry point {point.value} is a {type(family).__name__}, no Family")
        return family
    known = _own_families()
    if model_type not in known:
        raise UnknownModelTypeError(f"no family serves model type {model_type!r}; known are {sorted(known)}")
    return known[model_type]


@cache
def _own_families() -> Mapping[str, Family]:
    modules = [
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    ]
    families = [vars(module)["FAMILY"] for module in modules if "FAMILY" in vars(module)]
    return {model_type: family for family in families for model_type in family.model_types}
