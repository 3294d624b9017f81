"""Breaks one rank of a live server on demand. Python imports this by itself where this folder is on its path.

The file named by ``RDT_TEST_FAULT`` holds ``read RANK`` or ``commit RANK``, or nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec

FAULTS = {"rdt_core.subscriber": ("WeightSubscriber", "_read", "read")}
FAULTS["rdt_sglang.model"] = ("SglangModel", "finalize", "commit")


class _Breaker(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname in FAULTS:
            owner, name, word = FAULTS.pop(fullname)
            spec: Any = importlib.util.find_spec(fullname)  # by the other finders
            execute = spec.loader.exec_module

            def execute_and_break(module: types.ModuleType) -> None:
                execute(module)
                cls: Any = getattr(module, owner)
                setattr(cls, name, _breakable(getattr(cls, name), word))

            spec.loader.exec_module = execute_and_break
            return spec  # type: ignore[no-any-return]
        return None


def _breakable(original: Callable[..., Any], word: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        rank = getattr(self, "rank", None)
        rank = self._model.rank if rank is None else rank
        if Path(os.environ["RDT_TEST_FAULT"]).read_text() == f"{word} {rank}":
            raise RuntimeError(f"injected into {word} of rank {rank}")
        return original(self, *args, **kwargs)

    return call


if "RDT_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _Breaker())
