"""The door for transposed layers: transformers' `Conv1D` comes in as `nn.Linear`, and is stored as it was.

GPT-2's kind keep the matrices of their blocks as (in, out). A model that is loaded or made passes `linears`,
and from there on every matrix is (out, in). State dicts go on speaking the checkpoint's language, both ways:
whatever saves or loads a state writes and reads (in, out), without knowing of it.

The weight is a view of the same memory, so nothing is copied, and a product reads it in the same order: its
bits are those of the layer that it stands for.
"""

from typing import Any

from torch import Tensor, nn

from compress.tasks.registry import auto_class


class StoredTransposed(nn.Linear):
    """A linear layer whose weight is (out, in) in the model and (in, out) in state dicts."""

    def __init__(self, layer: Any) -> None:
        """Stand for a `Conv1D`, holding its weight and its bias."""
        stored: Tensor = layer.weight  # (in, out)
        super().__init__(stored.shape[0], stored.shape[1], device="meta")
        self.weight = nn.Parameter(stored.detach().T, requires_grad=stored.requires_grad)
        self.bias = layer.bias
        self.train(layer.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        key = f"{prefix}weight"
        turned = {key: state_dict[key].T} if key in state_dict else {}
        super()._load_from_state_dict({**state_dict, **turned}, prefix, *more)


def linears(model: Any) -> Any:
    """The model itself, every `Conv1D` in it replaced."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                setattr(parent, name, StoredTransposed(child))
    return model


def of_config(config: Any, **options: Any) -> Any:
    """A model of a configuration; `options` are those of transformers' `from_config`."""
    return linears(auto_class(config).from_config(config, **options))
