"""Does a written GGUF file hold the model, and does llama.cpp compute it?

First the file is read back with the `gguf` package: every tensor must be the weight that was written, bit for
bit where its type is exact, and within the bound of export/gguf/blocks.py where a minimum was rounded.
Then, where `llama_cpp` (llama-cpp-python) is installed, it scores held-out text: mean KL(torch || llama.cpp)
<= 0.05 nats. llama.cpp rounds activations to 8 bits in blocks of 32 when it multiplies codes, so a small
difference is expected, like that of the ONNX graphs which do the same; its size is in the notes.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.export.gguf.artifact import Part, parts
from compress.export.onnx.check import ExportCheckFailed, torch_logits
from compress.export.onnx.families import describe
from compress.formats import QuantizedTensor
from compress.host.progress import track
from compress.runtimes.exported import EXPORTED
from compress.runtimes.llama_cpp_runtime import LlamaCppRuntime
from compress.tasks.likelihood import mean_kl

TOLERANCE = 0.05  # nats per token

Floats = NDArray[np.float32]


def check_file(bundle: Bundle, file: Path) -> dict[str, Any]:
    """Read the file back and compare every tensor.

    Returns the number of tensors, and the largest error of a rounded minimum in steps of its grid (0 where
    none was rounded). Raises ExportCheckFailed where a tensor differs by more than its type explains.
    """
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    wanted = list(parts(describe(bundle.model), bundle.model.config))
    if sorted(found) != sorted(part.name for part in wanted):
        raise ExportCheckFailed("export_gguf: the file does not hold the tensors that were written")
    largest = 0.0
    for part in wanted:
        tensor = found[part.name]
        kind = tensor.tensor_type.name
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        expected = _in_order(part)
        if kind == "F16":
            expected = expected.astype(np.float16).astype(np.float32)
        if kind.endswith("_1"):
            steps = _steps(part, value - expected)
            largest = max(largest, steps)
            wrong = not steps <= (16 if kind == "Q4_1" else 32) / 2048
        else:
            wrong = not np.array_equal(value, expected)
        if wrong:
            raise ExportCheckFailed(f"export_gguf: {part.name} does not come back as it was written")
    return {"tensors": len(wanted), "largest_rounding_of_minima_in_steps": largest}


def check_llama_cpp(
    model: Any, file: Path, windows: NDArray[np.int32], threads: int, tolerance: float = TOLERANCE
) -> dict[str, Any] | None:
    """Score windows (n, length) in torch and llama.cpp; None where llama_cpp is not installed.

    Raises:
        ExportCheckFailed: llama.cpp does not load the file, or its logits are further away than `tolerance`.
    """
    if not EXPORTED["gguf"].installed:
        return None
    kl, nll_torch, nll_llama = [], [], []
    for window, found in zip(windows, llama_logits(file, windows, threads), strict=True):
        expected = torch_logits(model, window)
        kl.append(mean_kl(expected, found))
        nll_torch.append(_nll(expected, window))
        nll_llama.append(_nll(found, window))
    mean = float(np.mean(kl))
    if not mean <= tolerance:  # so that a NaN fails
        raise ExportCheckFailed(
            f"export_gguf: llama.cpp differs from torch by a KL of {mean:.3g} nats on {windows.size} "
            f"held-out tokens; the tolerance is {tolerance:g}. Raise it if rounded activations explain that"
        )
    return {
        "tokens": int(windows.size),
        "kl": mean,
        "nll_torch": float(np.mean(nll_torch)),
        "nll_llama_cpp": float(np.mean(nll_llama)),
        "tolerance": tolerance,
    }


def _nll(logits: Floats, window: NDArray[np.int32]) -> float:
    following = torch.from_numpy(window[1:].astype(np.int64))
    return float(F.cross_entropy(torch.from_numpy(logits)[:-1], following))


def llama_logits(file: Path, windows: NDArray[np.int32], threads: int) -> list[Floats]:
    """Every position's logits of windows (n, length) in llama.cpp: n arrays (length, vocabulary)."""
    try:
        llama = LlamaCppRuntime(file, threads)
    except UserError as error:
        raise ExportCheckFailed(f"export_gguf: {error}") from None
    with closing(llama), track(len(windows), "checking in llama.cpp", "windows") as progress:
        logits = []
        for window in windows:
            logits.append(llama.logits(window[None])[0])
            progress.advance()
    return logits


def _in_order(part: Part) -> Floats:
    """What a tensor of the file should stand for, in float32."""
    weight = part.value
    dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.detach().float()
    dense = dense.cpu()
    return np.asarray((dense if part.order is None else dense[part.order]).numpy(), dtype=np.float32)


def _steps(part: Part, error: Floats) -> float:
    """The largest error, in steps of the grid it belongs to; below float16's normal range, 2^-25 is free."""
    assert isinstance(part.value, QuantizedTensor)
    weight = part.value
    scales = weight.grid.scales if part.order is None else weight.grid.scales[part.order]
    width = weight.format.group_width(weight.shape[1])
    per_weight = np.repeat(np.abs(scales.numpy()), width, axis=1)[:, : weight.shape[1]]
    return float((np.clip(np.abs(error) - 2.0**-25, 0, None) / per_weight).max())
