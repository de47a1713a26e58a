"""Does stock `transformers` load what was written, and compute what the model computes?

The folder is loaded afresh with `from_pretrained` and asked twice. First its weights, once compressed-tensors
has unpacked them: each must be the one its codes stand for, bit for bit in float32 (rounded to float16 where
zero-points are read, since that product is computed in the type of the scales). Then its logits on held-out
text, in float32: mean KL(model || loaded) <= 0.001 nats, the room that the rounding of norms and embeddings
to float16 takes. A folder that fails either is an error.
Cost: the float32 weights in memory twice, and a forward pass of both models.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import reason
from compress.export.compressed_tensors.artifact import coded_linears
from compress.export.onnx.check import ExportCheckFailed
from compress.host.progress import track
from compress.models.running import device_of
from compress.models.stock import load_compressed_tensors
from compress.tasks.likelihood import mean_kl

TOLERANCE = 1e-3  # nats per token; of a model without logits, relative difference of its hidden states

_NAME = "export_compressed_tensors"


def check_loads(model: Any, folder: Path, windows: NDArray[np.int32], tolerance: float) -> dict[str, Any]:
    """Load `folder` with stock transformers and compare with `model` on windows (n, length).

    Raises:
        ExportCheckFailed: it does not load, or differs.
    """
    try:
        loaded = load_compressed_tensors(folder)
    except Exception as error:  # whatever the two libraries make of a folder they cannot read
        raise ExportCheckFailed(
            f"{_NAME}: transformers cannot load what was written: {reason(error)}"
        ) from None
    differences = []
    with track(len(windows), "checking in transformers", "windows") as progress:
        for window in windows:
            ids = torch.from_numpy(window.astype(np.int64))[None]
            with torch.inference_mode():
                expected = model(input_ids=ids.to(device_of(model)))[0][0].float().cpu()
                found = loaded(input_ids=ids)[0][0].float()
            if loaded.can_generate():
                differences.append(mean_kl(expected.numpy(), found.numpy()))
            else:
                differences.append(_distance(expected, found))
            progress.advance()
    wrong = [
        name for name, weight in coded_linears(model).items() if not _same(weight.dequantize(), loaded, name)
    ]
    if wrong:
        raise ExportCheckFailed(f"{_NAME}: {wrong[0]} does not come back as it was written")
    mean = float(np.mean(differences))
    if not mean <= tolerance:  # so that a NaN fails
        raise ExportCheckFailed(
            f"{_NAME}: loaded by transformers the model differs by {mean:.3g} (KL in nats) on {windows.size} "
            f"held-out tokens; the tolerance is {tolerance:g}. Set dtype: float32, or raise tolerance"
        )
    return {"tokens": int(windows.size), "kl": mean, "tolerance": tolerance, "passed": True}


def _same(expected: Tensor, loaded: Any, name: str) -> bool:
    found = loaded.get_submodule(name).weight.float().cpu()
    return torch.equal(found, expected.cpu()) or torch.equal(found, expected.half().float().cpu())


def _distance(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).norm() / expected.norm().clamp(min=1e-9))
