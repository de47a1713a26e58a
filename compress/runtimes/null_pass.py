"""Same model in, same model out: before any pass, what we load answers as the stock loader's model does.

Method. A short text goes through the model as passes get it (from the artifact that a run begins with, a
block at a time where they read so, every `Conv1D` a linear layer, tied as the files say), and through what
`transformers` makes of the source, in float32. A GGUF file is read by `transformers` for us, too, so its
model is compared with llama.cpp where that is installed. The largest difference may be 0.002 of the largest
answer; llama.cpp rounds activations and keys, so there the mean KL may be 0.05 nats.
Cost: loading the model twice and two forward passes of a few tokens; memory for it twice.
Limits: models up to 2 GB in float32; artifacts of codes, and weights that are quantized already, have no
stock loader that gives floats.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.artifact.bundle import Bundle
from compress.artifact.folder import MANIFEST, has_manifest
from compress.errors import UserError
from compress.host.scratch import scratch
from compress.models.checkpoints import meta_model
from compress.models.stacks import block_names
from compress.models.stock import load_stock
from compress.models.unused import quantization
from compress.records.manifest import Manifest
from compress.runtimes.exported import EXPORTED
from compress.tasks.base import longest_text
from compress.tasks.likelihood import mean_kl
from compress.tasks.registry import task_of

LARGEST = 2_000_000_000  # bytes of the model in float32
TOLERANCE = 2e-3  # of the largest answer
KL_TOLERANCE = 0.05  # nats per token, to llama.cpp
_TOKENS = 32
_TEXT = "The quick brown fox jumps over the lazy dog, and 12 more of them follow it home by night."
_ROUNDED = 1e-6  # of the largest value: no difference between layers

_Layers = list[tuple[str, Tensor]]


def null_pass(source: Path | str, folder: Path | None = None, *, verify: bool = True) -> str | None:
    """Compare the model of `source` as we load it with the stock loader's, before any pass.

    Args:
        source: directory, `.gguf` file or hub id.
        folder: the artifact that was made of it; by default `source` itself is loaded.
        verify: as of `Bundle.load`.

    Returns:
        Why nothing was compared, in words; None where both agree.

    Raises:
        UserError: they differ.
    """
    path = Path(source)
    if reason := _not_compared(path, source):
        return reason
    bundle = Bundle.load(folder or source, masks=False, stream=True, verify=verify)
    with scratch() as offloaded:
        bundle.offload(offloaded, whole=True)
    model = bundle.model.eval()
    tokens = _tokens(model, bundle.tokenizer)
    ours, layers = _answers(model, tokens)
    if path.is_file():
        _require_near(ours, _llama_cpp(path, tokens), source)
        return None
    del model, bundle
    theirs, others = _answers(load_stock(source), tokens)
    _require_same(ours, theirs, layers, others, source)
    return None


def _not_compared(path: Path, source: Path | str) -> str | None:
    """Why a source is not compared; None if it is."""
    if has_manifest(path):
        manifest = Manifest.read(path / MANIFEST)
        if manifest.layers or manifest.storage != "dense":
            return "its layers hold codes, which no stock loader reads"
    if path.is_file() and not EXPORTED["gguf"].installed:
        return "only llama.cpp tells what a GGUF means: pip install llama-cpp-python"
    model = meta_model(str(source))
    if quantization(model.config) is not None and not path.is_file():
        return "its weights are stored quantized"
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        return f"{size / 1e9:.1f} GB in float32 are loaded once only"
    return None


def _tokens(model: Any, tokenizer: Any) -> Tensor:
    """Some text, and ids from all over the vocabulary: int64 (1, length)."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    text = [t for t in tokenizer(_TEXT, verbose=False)["input_ids"] if t < rows][: _TOKENS // 2]
    spread = torch.linspace(0, rows - 1, _TOKENS - len(text)).long().tolist()
    return torch.tensor([[*text, *spread][: longest_text(model)]])


@torch.inference_mode()
def _answers(model: Any, tokens: Tensor) -> tuple[Tensor, _Layers]:
    """Answers (positions, width), float32, and what each block gave, by its name."""
    layers: _Layers = []

    def keep(name: str) -> Any:
        def hook(module: Any, given: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            layers.append((name, found.detach().float().clone()))

        return hook

    with ExitStack() as stack:
        for name in block_names(model):
            stack.callback(model.get_submodule(name).register_forward_hook(keep(name)).remove)
        answer = task_of(model.config).answers(model, tokens)[0].float()
    return answer, layers


def _llama_cpp(file: Path, tokens: Tensor) -> Tensor:
    from compress.runtimes.llama_cpp_runtime import LlamaCppRuntime

    llama = LlamaCppRuntime(file, torch.get_num_threads())
    try:
        return torch.from_numpy(llama.logits(tokens.numpy().astype(np.int32))[0])
    finally:
        llama.close()


def _require_same(ours: Tensor, theirs: Tensor, layers: _Layers, others: _Layers, source: Path | str) -> None:
    largest = float(theirs.abs().max())
    apart = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    if apart <= TOLERANCE * largest:  # a NaN is refused
        return
    first = next(
        (
            name
            for (name, one), (_, other) in zip(layers, others, strict=False)
            if not float((one - other).abs().max()) <= _ROUNDED * float(other.abs().max())
        ),
        "what comes after the last block",
    )
    raise UserError(
        f"{source}: as it is read here the model answers otherwise than stock transformers' (KL "
        f"{_kl(theirs, ours):.3g} nats, first in {first}); please report it, and take another checkpoint"
    )


def _require_near(ours: Tensor, theirs: Tensor, source: Path | str) -> None:
    kl = _kl(theirs, ours)
    if not kl <= KL_TOLERANCE:
        raise UserError(
            f"{source}: as it is read here the model answers otherwise than in llama.cpp (KL {kl:.3g} nats "
            "per token); take the checkpoint that the file was made of"
        )


def _kl(true: Tensor, other: Tensor) -> float:
    """Mean KL of the distributions that answers (positions, width) stand for, in nats."""
    if true.shape != other.shape:
        return float("inf")
    return mean_kl(true.numpy(), other.numpy())
