"""Is the exported encoder or encoder-decoder the model it came from? Asked on held-out text before it counts.

The reference is the torch model of the same bundle, which reads texts of different lengths one by one. ONNX
Runtime reads them so, too, and then all as one batch, padded on the right and, where the graph takes that, on
the left: all must give what torch gives.
Of a masked-LM model every seventh token is hidden; the first text of an encoder-decoder is written token by
token, from what it keeps, as in use. Three kinds of graph, each with a tolerance (of the task's scoring):

                          masked LM, encoder-decoder             embedding
    float32               largest |difference| <= 0.002 of the largest logit or state
    weights in codes      mean KL(torch || ONNX Runtime) <= 0.001   1 - cosine of each mean state <= 0.0001
    activations in codes  mean KL <= 0.05 nats                      1 - cosine <= 0.01

Cost: some thousand tokens in torch, three times as many in ONNX Runtime.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.export.onnx.check import ExportCheckFailed, GraphKind, refusal
from compress.host.progress import track
from compress.models.running import device_of
from compress.runtimes.base import Tokens
from compress.runtimes.onnx_encoder import OnnxEncoder
from compress.runtimes.onnx_seq2seq import OnnxSeq2Seq
from compress.tasks.base import Task
from compress.tasks.seq2seq import halves

_EVERY = 7  # of a masked-LM model's tokens one in so many is hidden

Answers = list[NDArray[np.float32]]  # of each text (length, width)


@dataclass
class EncoderAgreement:
    """What the comparison found: the worse of alone and padded, unless it says which."""

    kind: GraphKind
    task: str
    tolerance: float
    tokens: int
    max_difference: float
    largest: float
    loss: float
    loss_padded: float

    @property
    def measure(self) -> float:
        """What the tolerance bounds."""
        if self.kind == "float32":
            return self.max_difference / max(self.largest, 1e-9)
        return float(np.max([self.loss, self.loss_padded]))  # of a NaN, NaN

    @property
    def passed(self) -> bool:
        """Within the tolerance; not so where anything is no number."""
        return self.measure <= self.tolerance

    def notes(self) -> dict[str, Any]:
        """For the records."""
        return {**asdict(self), "measure": self.measure, "passed": self.passed}


def compare_encoder(
    model: Any,
    runtime: OnnxEncoder | OnnxSeq2Seq,
    windows: Tokens,
    kind: GraphKind,
    tolerance: float | None = None,
    padding: int = 0,
) -> EncoderAgreement:
    """Compare torch and an exported graph on windows (n, length); `padding` is the token that fills rows.

    Raises:
        ExportCheckFailed: with the numbers.
    """
    task = runtime.task
    texts = _texts(windows, runtime.mask_token)
    expected, alone = [], []
    with track(len(texts), "checking the graph", "texts") as progress:
        for text in texts:
            expected.append(_in_torch(model, text, task))
            alone.append(runtime.logits(text[None])[0])
            progress.advance()
    if isinstance(runtime, OnnxSeq2Seq):
        alone[0] = _token_by_token(runtime, texts[0])
    sides = (False, True) if runtime.takes_left else (False,)
    padded = [runtime.padded(texts, padding, left=left) for left in sides]
    result = EncoderAgreement(
        kind=kind,
        task=task.name,
        tolerance=task.scoring.tolerances[kind] if tolerance is None else tolerance,
        tokens=sum(len(text) for text in texts),
        max_difference=_largest_difference(expected, alone, *padded),
        largest=max(float(np.abs(answer).max()) for answer in expected),
        loss=_loss(task, expected, alone),
        loss_padded=float(np.max([_loss(task, expected, batch) for batch in padded])),
    )
    if not result.passed:
        raise ExportCheckFailed(_failure(result, task))
    return result


def _texts(windows: Tokens, mask_token: int | None) -> list[Tokens]:
    """The windows, the second a token shorter than the first and so on down to half; some tokens hidden."""
    length = windows.shape[1]
    texts = []
    for index, window in enumerate(windows):
        text = window[: length - index % max(1, length // 2)].copy()
        if mask_token is not None:
            text[_EVERY // 2 :: _EVERY] = mask_token
        texts.append(text)
    return texts


def _token_by_token(runtime: OnnxSeq2Seq, text: Tokens) -> NDArray[np.float32]:
    """What `logits` gives at once."""
    source, target = halves(text)
    states = [runtime.prefill(source[None])]
    for token in target[:-1]:
        states.append(runtime.decode(states[-1], token[None]))
    return np.concatenate([state.logits for state in states])


def _in_torch(model: Any, text: Tokens, task: Task) -> NDArray[np.float32]:
    ids = torch.from_numpy(text.astype(np.int64))[None].to(device_of(model))
    with torch.inference_mode():
        answer: NDArray[np.float32] = task.answers(model, ids)[0].float().cpu().numpy()
    return answer


def _largest_difference(expected: Answers, *found: Answers) -> float:
    # numpy's maximum, unlike Python's, keeps a NaN wherever it stands
    pairs = (pair for answers in found for pair in zip(expected, answers, strict=True))
    return float(np.max([np.abs(a - b).max() for a, b in pairs]))


def _loss(task: Task, expected: Answers, found: Answers) -> float:
    """The mean over texts of the task's distance."""
    return float(np.mean([task.scoring.distance(a, b) for a, b in zip(expected, found, strict=True)]))


def _failure(result: EncoderAgreement, task: Task) -> str:
    if result.kind == "float32":
        what = f"answers differ by {result.max_difference:.3g} (largest {result.largest:.3g})"
    else:
        what = f"{task.scoring.distance_name} is {result.loss:.3g}, of padded texts {result.loss_padded:.3g}"
    return refusal(result.kind, result.tokens, what, result.tolerance)
