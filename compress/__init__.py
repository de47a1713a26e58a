"""compress: shrink transformer language models, and tell the truth about what it cost.

The names below are loaded when they are first used; `import compress` alone loads neither torch nor onnx.
"""

import importlib
from typing import TYPE_CHECKING, Any

from compress.version import __version__

if TYPE_CHECKING:
    from compress.api import bench as bench
    from compress.api import compare as compare
    from compress.api import run as run
    from compress.bundle import Bundle as Bundle
    from compress.context import Context as Context
    from compress.data import DataConfig as DataConfig
    from compress.errors import UserError as UserError
    from compress.formats import Int4 as Int4
    from compress.formats import Int8 as Int8
    from compress.generation.generator import TextGenerator as TextGenerator
    from compress.generation.generator import generate as generate
    from compress.generation.sampling import Sampling as Sampling
    from compress.passes.base import Pass as Pass
    from compress.protocol import MeasureProtocol as MeasureProtocol
    from compress.recipe import Recipe as Recipe
    from compress.recipe import load_recipe as load_recipe
    from compress.records import Result as Result
    from compress.records import RunRecord as RunRecord
    from compress.records import read_results as read_results

    load = Bundle.load

# public name -> where it lives
_HOMES = {
    "Bundle": "compress.bundle:Bundle",
    "Context": "compress.passes.base:Context",
    "DataConfig": "compress.data:DataConfig",
    "Int4": "compress.formats:Int4",
    "Int8": "compress.formats:Int8",
    "MeasureProtocol": "compress.protocol:MeasureProtocol",
    "Pass": "compress.passes.base:Pass",
    "Recipe": "compress.recipe:Recipe",
    "Result": "compress.records:Result",
    "RunRecord": "compress.records:RunRecord",
    "Sampling": "compress.generation.sampling:Sampling",
    "TextGenerator": "compress.generation.generator:TextGenerator",
    "UserError": "compress.errors:UserError",
    "bench": "compress.api:bench",
    "compare": "compress.api:compare",
    "generate": "compress.generation.generator:generate",
    "load": "compress.bundle:Bundle.load",
    "load_recipe": "compress.recipe:load_recipe",
    "read_results": "compress.records:read_results",
    "run": "compress.api:run",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    module, _, path = _HOMES[name].partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
