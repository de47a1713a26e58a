"""A model as stock `transformers` loads it, without anything of ours: what others will run."""

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import MissingExtra
from compress.models.checkpoints import hub_revision, load_config, loading, quiet_transformers
from compress.models.pretrained import pretrained
from compress.tasks.registry import auto_class


def load_compressed_tensors(folder: Path) -> Any:
    """A folder of compressed-tensors in float32, in eval mode, its codes unpacked.

    Raises:
        MissingExtra: the package compressed-tensors is not installed.
        Exception: whatever the two libraries make of a folder that they cannot read.
    """
    import torch

    if find_spec("compressed_tensors") is None:
        raise MissingExtra("compressed-tensors", "compressed-tensors", f"loading {folder}")
    loader = auto_class(load_config(folder))
    # compressed-tensors draws progress bars that no setting turns off
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), torch.inference_mode():
        model = loader.from_pretrained(folder, dtype=torch.float32).eval()
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))  # unpacks
    return model


def load_stock(source: str | Path) -> Any:
    """What `transformers` makes of a directory or hub id, in float32, in eval mode.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoConfig

    revision = "main" if Path(source).is_dir() else hub_revision(str(source))
    with loading(f"model: '{source}' cannot be loaded"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision)
        model, _ = pretrained(source, config, revision=revision)
    return model.eval()
