"""What a model is asked when parts of it are judged: texts, their losses, how far two answers are apart.

    a decoder               next tokens of the calibration windows
    an encoder-decoder      the targets of labelled training texts, where there are any, after their sources;
                            else the second half of each window, after the first
    a masked-LM             those of its tokens that are hidden (tasks/masked.py), where there is a mask token
    a model with labels     labelled training texts, where there are any of its kind, by its own loss; else
                            the windows, by what it says of them itself: its likeliest label for the right one
    an encoder that embeds  the windows; it has no loss

Answers are apart by KL in nats, per token, word, label, end or text; numbers by their squared difference,
embeddings by 1 - cosine. The scale is what a model loses that gives all texts one answer, their mean; where
an answer is a place in a text, one that finds all its places alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UserError
from compress.tasks.base import UNKNOWN, Example, Task
from compress.tasks.embedding import Embedding
from compress.tasks.masked import MASKED
from compress.tasks.registry import task_of
from compress.tasks.seq2seq import halves, shifted, start_token
from compress.text.labelled.encoded import LabelledData

_FEWEST = 64  # labelled texts, where there are as many
_WINDOW = 512  # tokens: models that do not predict tokens are judged on as many windows as hold so many


@dataclass(frozen=True)
class Text:
    """A text to ask a model about.

    Attributes:
        inputs: of the call, by name, each (1, length).
        rows: of its answer, those that count; None: all.
        targets: what is right about them; None where nobody knows.
    """

    inputs: Mapping[str, Any]
    rows: Tensor | None = None
    targets: Tensor | None = None


@dataclass(frozen=True)
class Prober:
    """Texts to ask a model about, in the place of, or from, calibration windows.

    Attributes:
        labelled: the labelled texts, if there are any.
        mask_token: of the tokenizer, if it has one.
    """

    labelled: LabelledData | None = None
    mask_token: int | None = None

    def windows_for(self, model: Any, count: int, length: int) -> int:
        """How many calibration windows stand for `count` of them: more, where they are short texts."""
        return count if task_of(model.config).predicts else count * max(1, _WINDOW // length)

    def texts(self, model: Any, windows: Tensor, *, last: bool = False) -> list[Text]:
        """Texts in the place of windows (n, length), about as many tokens; `last`: from the end."""
        task = task_of(model.config)
        if self.labelled is not None and task.labels == self.labelled.kind:
            return self._labelled(model, self.labelled, windows, last)
        return [self._window(model, window, number) for number, window in enumerate(windows)]

    def _labelled(self, model: Any, labelled: LabelledData, windows: Tensor, last: bool) -> list[Text]:
        examples = labelled.train
        order = np.random.default_rng(len(examples)).permutation(len(examples))
        count = max(_FEWEST, round(windows.numel() * len(examples) / examples.size))
        chosen = order[-count:] if last else order[:count]
        found = [examples[int(number)] for number in chosen]
        if task_of(model.config).stacks == 1:
            return [_of_example(example, labelled.kind, windows.device) for example in found]
        pairs = ((torch.from_numpy(part.astype(np.int64)) for part in (e.ids, e.targets)) for e in found)
        return [_answered(model, *(part.to(windows.device) for part in pair)) for pair in pairs]

    def _window(self, model: Any, window: Tensor, number: int) -> Text:
        task = task_of(model.config)
        if task.stacks == 2:
            return _answered(model, *halves(window))
        inputs = {"input_ids": window[None], **task.options}
        if task is not MASKED or self.mask_token is None:
            return Text(inputs, targets=window[1:] if task.continues else None)
        asked = task.question(window.cpu().numpy().astype(np.int32), number, self.mask_token)
        ids, rows, targets = (
            torch.from_numpy(np.asarray(each).astype(np.int64)).to(window.device)
            for each in (asked.inputs, asked.rows, asked.targets)
        )
        return Text({"input_ids": ids[None]}, rows, targets)


def _answered(model: Any, source: Tensor, target: Tensor) -> Text:
    """What an encoder-decoder is to give, (targets,), of a source (length,)."""
    text = shifted(target[None], start_token(model))
    return Text({"input_ids": source[None], "decoder_input_ids": text, "use_cache": False}, targets=target)


def answer(model: Any, text: Text) -> Tensor:
    """What counts of a model's answer, comparable: (n, k) log-probabilities, a number, or a unit vector."""
    task = task_of(model.config)
    rows = _rows(task, model(**text.inputs), text)
    if task.labels == "number":
        return rows
    if task.labels == "classes":
        return torch.stack([rows, torch.zeros_like(rows)], -1).flatten(0, 1).log_softmax(-1)
    if task.predicts or task.labels is not None:
        return rows.log_softmax(-1)
    states = rows[task.states] if isinstance(task, Embedding) else rows
    return F.normalize(states.mean(0, keepdim=True), dim=-1)


def distance(task: Task, wanted: Tensor, found: Tensor) -> float:
    """How far an answer is from the wanted one, a mean over its rows."""
    if task.labels == "number":
        return float((wanted - found).square().mean())
    if task.predicts or task.labels is not None:
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return float(1 - (wanted * found).sum(-1).mean())


def one_answer(task: Task, wanted: Sequence[Tensor]) -> float:
    """How far the answers are from their own mean: what is lost by a model that answers every text alike."""
    if task.labels == "span":  # tokens of one text are none of another: all alike
        return sum(float((p.exp() * p).sum(-1).mean()) + math.log(p.shape[1]) for p in wanted) / len(wanted)
    rows = torch.cat(list(wanted))
    if task.labels == "number":
        return float(rows.var(correction=0))
    if task.predicts or task.labels is not None:
        if task.labels == "classes":  # each label has a mean of its own
            rows = rows.view(len(wanted), -1, 2)
        mean = (rows.logsumexp(0) - math.log(len(rows))).clamp(min=-1e4)
        return float((rows.exp() * (rows.clamp(min=-1e4) - mean)).sum(-1).mean())
    return float(1 - (rows @ F.normalize(rows.mean(0), dim=0)).mean())


def unit(task: Task) -> str:
    """What distances are measured in."""
    if task.labels == "number":
        return "squared difference"
    if task.labels is not None:
        per = {"tags": "word", "classes": "label", "span": "end", "text": "token"}
        return "nats per " + per.get(task.labels, "text")
    return "nats per token" if task.predicts else "1 - cosine"


def loss(model: Any, text: Text) -> Tensor:
    """The task's own loss of a text, with its gradient (see the module's text).

    Raises:
        UserError: the model has none.
    """
    task = task_of(model.config)
    outputs = model(**text.inputs)
    if task.continues:
        return F.cross_entropy(outputs[0][0, :-1].float(), text.inputs["input_ids"][0, 1:])
    rows, targets = _rows(task, outputs, text), text.targets
    if task.labels == "number":
        return rows.mean() if targets is None else F.mse_loss(rows.flatten(), targets.flatten())
    if task.labels == "classes":
        right = (rows.detach() > 0).float() if targets is None else targets[None].float()
        return F.binary_cross_entropy_with_logits(rows, right)
    if task.labels is None and targets is None:
        raise UserError(
            f"prune_structured.importance: 'taylor' needs a loss, and {task.noun} without a mask token or "
            "labels has none; take activation, magnitude, kl or reconstruction"
        )
    return F.cross_entropy(rows, rows.detach().argmax(-1) if targets is None else targets)


def _rows(task: Task, outputs: Any, text: Text) -> Tensor:
    """The rows of an answer (1, ..., k) that count, (n, k), in float32; of answers (2, length)."""
    answer = task.given(outputs)
    rows = (answer[0] if answer.dim() == 3 else answer).float()
    if task.labels == "span":
        return rows.T
    return rows if text.rows is None else rows[text.rows]


def _of_example(example: Example, kind: str, device: torch.device) -> Text:
    def on(values: Any) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(device)

    inputs = {"input_ids": on(example.ids.astype(np.int64))[None]}
    if example.types is not None:
        inputs["token_type_ids"] = on(example.types.astype(np.int64))[None]
    if kind != "tags":
        dtype = np.float32 if kind == "number" else np.int64
        return Text(inputs, targets=on(example.targets.astype(dtype)))
    rows = np.flatnonzero(example.targets != UNKNOWN)
    return Text(inputs, on(rows), on(example.targets[rows].astype(np.int64)))
