"""compress: shrink transformer language models, and tell the truth about what it cost.

The public names and where they live are written once, in `__init__.pyi`. Each is loaded when it is first
used; `import compress` alone loads neither torch nor onnx.
"""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from compress.version import __version__

_HERE = Path(__file__)


def _homes() -> dict[str, str]:
    """Public name -> the module it lives in."""
    tree = ast.parse(_HERE.with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOMES = _homes()
# folders named like what they do: `compress.run(...)` runs, and `compress.run.recipe` is a file in it
_VERBS = {name for name in _HOMES if (_HERE.parent / name).is_dir()}

__all__ = ["__version__", *(name for name in _HOMES if name != "__version__")]


class _Verb(ModuleType):
    """A folder that can be called."""

    @property
    def _function(self) -> Callable[..., Any]:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_HOMES[name]), name)

    def __call__(self, *args: Any, **fields: Any) -> Any:
        return self._function(*args, **fields)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)


class _Front(ModuleType):
    """This package: its verbs become callable when Python binds them here as folders."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    if name in _VERBS:
        return importlib.import_module(f"compress.{name}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
