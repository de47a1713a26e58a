"""What `transformers` makes of weights, or one line that says which of them do not fit."""

from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.tasks.registry import auto_class


def pretrained(source: str | Path, config: Any, **options: str) -> tuple[Any, dict[str, Any]]:
    """What transformers makes of a source in float32, and what it says of names in the files.

    Raises:
        UserError: a tensor of another shape than the configuration gives it, or parts of one that do not fit
            together. `transformers` refuses both, too, and points to a table among its warnings.
    """
    import torch

    try:
        model, found = auto_class(config).from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except RuntimeError as error:
        if "`CONVERSION`" not in str(error):
            raise
        raise UserError(
            f"model: '{source}': tensors that make up one of the model's (experts, or query, key and value) "
            "have shapes that do not fit together; download it again"
        ) from None
    for name, stored, own in sorted(found["mismatched_keys"]):
        raise UserError(
            f"model: '{source}': '{name}' is {list(stored)} in the files and {list(own)} by the "
            "configuration; copy both again"
        )
    return model, found
