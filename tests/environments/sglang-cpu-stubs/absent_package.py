"""Lets a package be imported whose real one is not there and that nothing calls into."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class AbsentModule(types.ModuleType):
    """Any submodule, function, decorator, constant or class of the package, all of them empty.

    A capitalised attribute is an empty class, so that others can inherit from it and annotate with it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = "3.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        made: Any = (
            _make_class(name, self.__name__)
            if name[:1].isupper()
            else AbsentModule(f"{self.__name__}.{name}")
        )
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **options: Any) -> Any:
        """A decorator, with or without arguments, that decorates nothing."""
        if len(args) == 1 and callable(args[0]) and not options:
            return args[0]
        return lambda function: function

    def __getitem__(self, key: object) -> AbsentModule:
        return self

    # Without these three, `name in module` would ask __getitem__ for ever.
    def __contains__(self, key: object) -> bool:
        return False

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False


class _EmptyMeta(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def _make_class(name: str, module: str) -> type:
    def accept_anything(self: object, *args: object, **options: object) -> None:
        del self, args, options

    return _EmptyMeta(name, (), {"__module__": module, "__init__": accept_anything})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule of one absent package."""

    def __init__(self, package: str) -> None:
        self._prefix = f"{package}."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if not fullname.startswith(self._prefix):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        del module


def stand_in(package: str, **attributes: object) -> None:
    """Replace the module of this name, which is being imported, by an absent one."""
    module = AbsentModule(package)
    module.__spec__ = sys.modules[package].__spec__
    module.__file__ = sys.modules[package].__file__
    for name, value in attributes.items():
        setattr(module, name, value)
    sys.modules[package] = module
    sys.meta_path.insert(0, _Finder(package))
