"""One block of a model as a function: what it is called with, and how a module in it is replaced."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compress.models.running import Precision, autocast

Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]  # what a block is called with, per batch


def call(block: nn.Module, hidden: Tensor, arguments: tuple[Any, Any], precision: Precision) -> Tensor:
    """Run a block: (batch, length, width) -> the same, float32."""
    args, kwargs = arguments
    with autocast(hidden.device, precision):
        output = block(hidden, *args, **kwargs)
    return (output[0] if isinstance(output, tuple) else output).float()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else while the block runs."""
    own = vars(module).get("forward")  # a wrapper on the instance, if it has one
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own
