"""What a checkpoint on this host holds: names, shapes and dtypes, not a byte of a tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rdt_core.manifest import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

_INDEX = "model.safetensors.index.json"

# Source: the safetensors format's own names.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_specs(folder: Path) -> tuple[TensorSpec, ...]:
    """Every tensor of the safetensors files in a folder, by name; empty where there are none.

    Called in each scheduler's process while a server starts. Reads headers only.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no checkpoint of weights in plain floating point.
    """
    from safetensors import SafetensorError  # noqa: PLC0415  SGLang's own

    specs: dict[str, TensorSpec] = {}
    for file in _files(folder):
        try:
            specs |= {spec.name: spec for spec in _specs_in(file)}
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
    return tuple(specs[name] for name in sorted(specs))


def _specs_in(file: Path) -> Iterator[TensorSpec]:
    from safetensors import safe_open  # noqa: PLC0415  SGLang's own

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  no mapping
            view = tensors.get_slice(name)
            dtype = _DTYPES.get(view.get_dtype())
            if dtype is None:
                raise ValueError(f"{name} in {file} is {view.get_dtype()}, expected floating point")
            yield TensorSpec(name, tuple(view.get_shape()), dtype)


def _files(folder: Path) -> Iterator[Path]:
    index = folder / _INDEX
    if not index.is_file():
        yield from sorted(folder.glob("*.safetensors"))
        return
    for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        yield folder / Path(name).name
