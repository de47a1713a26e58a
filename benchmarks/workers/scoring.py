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

from compress import Scores, open_runtime, score


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
    found = score(forward_of(base, out), windows, base=reference, threads=threads)
    quality = found.quality(Scores(**json.loads(kept.read_text())), text_bytes=1)
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


def forward_of(base: Path, out: Path) -> Any:
    """The model with what a tool made of its weights, in float32: tokens to logits, as `forward`."""
    gguf, weights = out / "artifact" / "model.gguf", out / "weights.safetensors"
    if gguf.is_file() or not weights.is_file():
        return open_runtime(gguf if gguf.is_file() else out / "artifact", "torch").logits
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    assert not unexpected, f"{weights}: {unexpected[0]} is no weight of the base"
    left = [name for name in missing if ".layers." in name and model.get_parameter(name).dim() == 2]
    assert not left, f"{weights}: lacks {left[0]}, so the base would be scored"
    return forward(model.eval())


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
