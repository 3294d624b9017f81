"""Puts gates (tests.faults.gates) into every process of a real engine; Python imports this by itself."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import types
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

MODELS = {"rdt_vllm.model": "VllmModel", "rdt_sglang.model": "SglangModel"}


class _Gatekeeper(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._todo = {"rdt_core.subscriber", *MODELS}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname not in self._todo:
            return None
        self._todo.remove(fullname)
        spec: Any = importlib.util.find_spec(fullname)  # by the other finders
        execute = spec.loader.exec_module

        def execute_and_gate(module: types.ModuleType) -> None:
            from tests.faults.gates import gate_model, gate_subscriber

            execute(module)
            if fullname in MODELS:
                gate_model(getattr(module, MODELS[fullname]))
            else:
                gate_subscriber(module)

        spec.loader.exec_module = execute_and_gate
        return spec  # type: ignore[no-any-return]


if "RDT_TEST_GATES" in os.environ:
    sys.meta_path.insert(0, _Gatekeeper())
