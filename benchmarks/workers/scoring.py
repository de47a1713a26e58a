"""One scorer for all tools: the weights that the codes stand for, in torch, float32.

    python scoring.py BASE EVALUATION REFERENCE OUT

Scores the weights that a worker left in OUT, on windows of tokens (n, length), against the logits of BASE
in the folder REFERENCE, which is filled first if it is empty. Activations are not rounded by anybody, so
what is compared is what the codes lose, not what a runtime's kernels do. Prints a JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.artifact.bundle import Bundle
from compress.formats import QuantizedEmbedding, QuantizedLinear
from compress.measure.quality import Scores, score, summarise
from compress.models.checkpoints import load_checkpoint
from compress.models.layers import replace_module


def main() -> None:
    base, evaluation, reference, out = map(Path, sys.argv[1:])
    windows = np.load(evaluation).astype(np.int32)
    threads = torch.get_num_threads()
    kept = reference / "scores.json"
    if not kept.is_file():
        reference.mkdir(parents=True, exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        scores = score(forward(model), windows, keep=reference, threads=threads)
        kept.write_text(json.dumps(scores.to_json()))
        del model
    found = score(forward(load(base, out)), windows, base=reference, threads=threads)
    quality = summarise(found, Scores(**json.loads(kept.read_text())), text_bytes=1)
    print(
        json.dumps(
            {
                "delta_nll": quality.delta_nll,
                "kl": quality.kl_to_base,
                "kl_ci95": quality.kl_ci95,
                "top1_agreement": quality.top1_agreement,
                "perplexity": quality.perplexity,
                "linear_bytes": gguf_linear_bytes(out),
            }
        )
    )


def load(base: Path, out: Path) -> Any:
    """The model with what a tool made of its weights, in float32."""
    gguf, weights = out / "artifact" / "model.gguf", out / "weights.safetensors"
    if gguf.is_file():
        return load_checkpoint(gguf)[0].eval()
    if not weights.is_file():
        return floated(Bundle.load(out / "artifact").model)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    assert not unexpected, f"{weights}: {unexpected[0]} is no weight of the base"
    left = [name for name in missing if ".layers." in name and model.get_parameter(name).dim() == 2]
    assert not left, f"{weights}: lacks {left[0]}, so the base would be scored"
    return model.eval()


def floated(model: Any) -> Any:
    """Layers of codes become layers of the floats that the codes stand for, which run faster."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            weight = module.quantized.dequantize()
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                layer.bias = torch.nn.Parameter(module.bias.detach(), requires_grad=False)
            replace_module(model, name, layer)
        elif isinstance(module, QuantizedEmbedding) and module.scale == 1.0:
            table = torch.nn.Embedding.from_pretrained(module.quantized.dequantize())
            replace_module(model, name, table)
    return model


def forward(model: Any) -> Any:
    """Tokens (1, length) -> logits (1, length, V), float32."""

    @torch.inference_mode()
    def run(tokens: np.ndarray) -> np.ndarray:
        logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits
        return logits.float().numpy()

    return run


def gguf_linear_bytes(out: Path) -> int | None:
    """Of the matrices inside the blocks of a GGUF file; None for other artifacts."""
    file = out / "artifact" / "model.gguf"
    if not file.is_file():
        return None
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    return sum(int(t.n_bytes) for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2)


main()
