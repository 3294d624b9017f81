"""Changes the processes of a live server. Python imports this by itself where this folder is on its path.

The file named by ``RDT_TEST_FAULT`` breaks one rank on demand: ``read RANK`` or ``commit RANK``. ``no hook``
takes from SGLang's schedulers the method that this project hooks. Nothing in the file breaks nothing.
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

_WAIT_MS = 20


def _told() -> str:
    return Path(os.environ["RDT_TEST_FAULT"]).read_text()


def _break_read(module: types.ModuleType) -> None:
    cls: Any = module.WeightSubscriber
    cls._read = _breakable(cls._read, "read")


def _break_commit(module: types.ModuleType) -> None:
    cls: Any = module.SglangModel
    cls.finalize = _breakable(cls.finalize, "commit")


def _take_hook(module: types.ModuleType) -> None:
    # A child imports this while it unpickles its arguments, when it does not know its parent yet.
    if _told() == "no hook" and "--multiprocessing-fork" in sys.orig_argv:
        del module.Scheduler.init_request_dispatcher


def _let_wait(module: types.ModuleType) -> None:
    """The controller of data parallelism asks its socket over and over, with a whole core of a few."""
    receive: Any = module.sock_recv

    def wait_and_receive(socket: Any, flags: int = 0) -> Any:
        socket.poll(_WAIT_MS)
        return receive(socket, flags=flags)

    module.sock_recv = wait_and_receive  # type: ignore[attr-defined]  # a module is open to attributes


CHANGES: dict[str, Callable[[types.ModuleType], None]] = {
    "rdt_core.subscriber": _break_read,
    "rdt_sglang.model": _break_commit,
    "sglang.srt.managers.data_parallel_controller": _let_wait,
    "sglang.srt.managers.scheduler": _take_hook,
}


class _Changer(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname not in CHANGES:
            return None
        change = CHANGES.pop(fullname)
        spec: Any = importlib.util.find_spec(fullname)  # by the other finders
        execute = spec.loader.exec_module

        def execute_and_change(module: types.ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change
        return spec  # type: ignore[no-any-return]


def _breakable(original: Callable[..., Any], word: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        rank = getattr(self, "rank", None)
        rank = self._model.rank if rank is None else rank
        if _told() == f"{word} {rank}":
            raise RuntimeError(f"injected into {word} of rank {rank}")
        return original(self, *args, **kwargs)

    return call


if "RDT_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _Changer())
