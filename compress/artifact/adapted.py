"""A bundle with a LoRA adapter merged into its weights: what is pruned stays zero, and it says what it is."""

from pathlib import Path
from typing import Any, TypeVar

import torch

from compress.models.adapters import with_adapter

_Bundle = TypeVar("_Bundle", bound=Any)  # compress.Bundle, which stands above this file


def adapted(bundle: _Bundle, folder: Path) -> _Bundle:
    """The bundle, its model changed in place, without exports of what it was.

    Raises:
        UserError: the folder holds no adapter of this model.
    """
    with_adapter(bundle.model, folder)
    with torch.no_grad():
        for name, kept in bundle.masks.items():
            bundle.model.get_submodule(name).weight.masked_fill_(~kept, 0.0)
    source = f"{bundle.lineage.source} with {folder} merged"
    lineage = bundle.lineage.model_copy(update={"source": source})
    return bundle.evolve(lineage=lineage, exports={}, adapter=folder)
