"""Is the exported graph the model that was exported? Asked on held-out text before the export counts.

The reference is the torch model of the same bundle; a layer of codes counts as the weight it stands for.
Three kinds of graph, three tolerances:

    float32               |logit difference| <= 0.002 of the largest logit, and the same greedy
                          continuations token for token
    weights in codes      mean KL(torch || ONNX Runtime) <= 0.001 nats
    activations in codes  mean KL <= 0.05 nats: rounding activations to 8 bits is part of that graph, and its
                          cost is measured like every other

Every window is scored twice: all positions at once, and through the key-value cache (a prompt, then one
token at a time); both must pass. Where two tokens' logits in torch are closer than the tolerance, either
is a right greedy choice: such a tie is counted and ends the comparison of that continuation.
Cost: some thousand tokens in torch and ONNX Runtime.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.progress import track
from compress.models.running import device_of
from compress.runtimes.base import Runtime, Tokens
from compress.tasks.likelihood import LIKELIHOOD, mean_kl

GraphKind = Literal["float32", "weights", "activations"]
_STEPS = 16  # tokens of each window that go through the cache one at a time, and of each continuation


class ExportCheckFailed(UserError):
    """The exported graph does not compute what the model computes."""


@dataclass
class Agreement:
    """What the comparison found; differences in logits, KL in nats per token."""

    kind: GraphKind
    tolerance: float
    tokens: int
    max_difference: float = 0.0
    largest_logit: float = 0.0
    kl: float = 0.0
    kl_cached: float = 0.0
    top1_agreement: float = 1.0
    greedy_tokens: int = 0
    greedy_ties: int = 0
    greedy_mismatches: int = 0

    @property
    def measure(self) -> float:
        """What the tolerance bounds."""
        if self.kind == "float32":
            return self.max_difference / max(self.largest_logit, 1e-9)
        return float(np.max([self.kl, self.kl_cached]))  # of a NaN, NaN; so is Python's max() only at times

    def notes(self) -> dict[str, Any]:
        """For the records."""
        return {**asdict(self), "measure": self.measure, "passed": self.passed}

    @property
    def passed(self) -> bool:
        """Within the tolerance, and no continuation differs."""
        # written so that a NaN fails
        return self.measure <= self.tolerance and self.greedy_mismatches == 0


def compare(
    model: Any, runtime: Runtime, windows: Tokens, kind: GraphKind, tolerance: float | None = None
) -> Agreement:
    """Compare torch and an exported graph on windows (n, length).

    Raises:
        ExportCheckFailed: with the numbers.
    """
    limit = LIKELIHOOD.tolerances[kind] if tolerance is None else tolerance
    result = Agreement(kind, limit, int(windows.size))
    kl, kl_cached, same = [], [], []
    with track(3 * len(windows), "checking the graph", "passes over a window") as progress:
        for window in windows:
            expected = torch_logits(model, window)
            progress.advance()
            found = runtime.logits(window[None])[0]
            progress.advance()
            cached = _through_cache(runtime, window)
            progress.advance()
            tail = expected[-len(cached) :]
            differences = [result.max_difference, np.abs(found - expected).max(), np.abs(cached - tail).max()]
            result.max_difference = float(np.max(differences))
            result.largest_logit = max(result.largest_logit, float(np.abs(expected).max()))
            kl.append(mean_kl(expected, found))
            kl_cached.append(mean_kl(tail, cached))
            same.append(float((expected.argmax(-1) == found.argmax(-1)).mean()))
    result.kl, result.kl_cached = float(np.mean(kl)), float(np.mean(kl_cached))
    result.top1_agreement = float(np.mean(same))
    if kind == "float32":
        for window in windows:
            _compare_greedy(model, runtime, window[: max(len(window) // 2, 1)], result)
    if not result.passed:
        raise ExportCheckFailed(_failure(result))
    return result


def _through_cache(runtime: Runtime, window: Tokens) -> NDArray[np.float32]:
    """Logits of the last positions, the first of them by prefill, the others by decode: (steps, vocab)."""
    steps = min(_STEPS, len(window))
    prompt = len(window) - steps + 1
    state = runtime.prefill(window[None, :prompt])
    rows = [state.logits[0].copy()]
    for token in window[prompt:]:
        state = runtime.decode(state, np.asarray([token], dtype=np.int32))
        rows.append(state.logits[0].copy())
    return np.stack(rows)


def _compare_greedy(model: Any, runtime: Runtime, prompt: Tokens, result: Agreement) -> None:
    """Continue a prompt greedily with torch, asking the graph for each token it would have chosen."""
    text = prompt
    state = runtime.prefill(prompt[None])
    for _ in range(_STEPS):
        expected = torch_logits(model, text)[-1]
        wanted, chosen = int(expected.argmax()), int(state.logits[0].argmax())
        result.greedy_tokens += 1
        if wanted != chosen:
            tie = expected[wanted] - expected[chosen] <= 2 * result.tolerance * result.largest_logit
            result.greedy_ties += int(tie)
            result.greedy_mismatches += int(not tie)
            return
        token = np.asarray([wanted], dtype=np.int32)
        text = np.concatenate((text, token))
        state = runtime.decode(state, token)


def torch_logits(model: Any, window: Tokens) -> NDArray[np.float32]:
    """Every position's logits of a window (length,): (length, vocabulary)."""
    ids = torch.from_numpy(window.astype(np.int64))[None].to(device_of(model))
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()
    return logits


def _failure(result: Agreement) -> str:
    if result.greedy_mismatches:
        what = f"{result.greedy_mismatches} greedy continuations differ"
    elif result.kind == "float32":
        what = f"logits differ by {result.max_difference:.3g} (largest logit {result.largest_logit:.3g})"
    else:
        what = f"KL is {result.kl:.3g}, through the cache {result.kl_cached:.3g}"
    return refusal(result.kind, result.tokens, what, result.tolerance)


def refusal(kind: GraphKind, tokens: int, what: str, tolerance: float) -> str:
    """The line that says why an export does not count; `what`: by how much it differs."""
    return (
        f"export_onnx: the {kind} graph fails its check on {tokens} held-out tokens: {what}; "
        f"the tolerance is {tolerance:g}. Set another int8_form or accuracy_level, "
        "activation_bits: 8 with the forms token and tensor (where the processor has VNNI, processor: vnni, "
        "which is faster), or raise tolerance"
    )
