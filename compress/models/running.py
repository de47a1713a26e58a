"""How a model is run while it trains: precision, attention, and its held-out loss."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import UserError
from compress.host.float32 import fast_float32
from compress.host.memory import kept_for_reuse
from compress.models.attention import panel_attention

Precision = Literal["float32", "bfloat16"]
_HELDOUT_LOGITS = 1 << 24  # per forward pass, or one window's; they are there four times over in between


def native_precision() -> Precision:
    """`bfloat16` where the CPU multiplies it in hardware (AVX512-BF16, AMX), else `float32`."""
    capable = torch.backends.cpu.get_cpu_capability()
    native = capable.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def device_of(model: Any) -> torch.device:
    """Where a model is, by its first tensor: of one all of whose weights are codes there is no parameter."""
    found: torch.device = next(chain(model.parameters(), model.buffers())).device
    return found


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Matrix products in `precision`, sums and norms in float32; parameters stay as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def backward_passes(*models: Any) -> Iterator[None]:
    """What makes many passes, back and forth, fast while the block runs."""
    with ExitStack() as stack:
        stack.enter_context(kept_for_reuse())
        stack.enter_context(fast_float32())
        for model in models:
            stack.enter_context(panel_attention(model))
        yield


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode while the block runs."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


@contextmanager
def gradients(model: Any, wanted: bool) -> Iterator[None]:
    """All weights need a gradient, or none does, while the block runs."""
    needed = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(wanted)
    try:
        yield
    finally:
        for parameter, own in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(own)


@contextmanager
def gradients_of_activations(model: Any) -> Iterator[None]:
    """Everything that is computed from the tokens has a gradient, and no weight, while the block runs."""
    embedding = model.get_input_embeddings()
    # an encoder-decoder looks up rows in other modules that hold the same table
    tables = [m for m in model.modules() if m is embedding or _looks_up(m, embedding)]
    with ExitStack() as stack:
        stack.enter_context(gradients(model, False))
        stack.enter_context(torch.enable_grad())
        for table in tables:
            hook = table.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
            stack.callback(hook.remove)
        yield


def _looks_up(module: nn.Module, embedding: Any) -> bool:
    """Whether a module looks up rows of another one's table."""
    return isinstance(module, nn.Embedding) and module.weight is getattr(embedding, "weight", None)


@contextmanager
def gradient_checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Keep the inputs of each block only, and compute the rest again for the gradient (Chen et al. 2016).

    Raises:
        UserError: the architecture has no such mode.
    """
    if not wanted:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing: transformers has none for {type(model).__name__}; leave it false"
        )
    mode = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # by version
    getattr(model, f"{mode}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{mode}_checkpointing_disable")()


@torch.no_grad()
def heldout_nll(model: Any, windows: Tensor, precision: Precision) -> float:
    """Mean nats per predicted token of (n, length) windows, in the precision of training.

    For curves and for stopping; the reported quality is `compress.measure`'s, from the saved artifact.
    """
    total = 0.0
    row = int(model.config.get_text_config().vocab_size) * windows.shape[1]
    with evaluating(model):
        for rows in windows.split(max(1, _HELDOUT_LOGITS // row)):
            with autocast(windows.device, precision):
                logits = model(input_ids=rows, use_cache=False).logits[:, :-1]  # (rows, length - 1, vocab)
            wanted = rows[:, 1:].flatten()
            total += float(F.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="sum"))
    return total / (windows.shape[0] * (windows.shape[1] - 1))
