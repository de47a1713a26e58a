"""Masked language modelling: the hidden tokens of whole windows, hidden anew in every epoch.

    loss = mean over hidden tokens of -ln p(token | the window with its hidden tokens)

tasks/masked.py draws them. A head that is one module (BERT's `cls`, RoBERTa's `lm_head`) is given the hidden
positions alone, a seventh of all. The held-out loss is that of the task's fixed draws, so that the points of
a curve compare.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.context import TrainingContext
from compress.errors import UserError
from compress.models.running import Precision, autocast, evaluating
from compress.tasks.base import UNKNOWN, rows_of
from compress.tasks.masked import HIDDEN, MASKED, hide
from compress.training.batches import Batches
from compress.training.objectives.base import Asked, Moment, Objective
from compress.training.objectives.losses import chunked, cross_entropy
from compress.training.plan import Optimization

Hiding = Callable[[Any, Sequence[np.random.Generator]], tuple[Any, Any]]  # tokens -> inputs, targets
_HEADS = ("cls", "lm_head")  # what families of `transformers` call them
_TOGETHER = 16  # held-out windows per forward pass


def masked_text(
    plan: Optimization,
    model: Any,
    tokenizer: Any,
    context: TrainingContext,
    *,
    share: float = HIDDEN,
    whole_words: bool = False,
    chosen: "Chosen | None" = None,
    where: str = "train",
) -> Objective:
    """The objective of filling in hidden tokens.

    Args:
        plan: says how many windows of what length make up a step.
        model: of the task `masked`.
        tokenizer: has a mask token.
        context: the text.
        share: of a window's tokens that are hidden.
        whole_words: hide all pieces of a word together.
        chosen: told which positions are hidden, from a question to its loss; one of its own while None.
        where: the pass's name, for errors.

    Raises:
        UserError: no mask token; no pieces that tell which word they are of.
    """
    mask_token = MASKED.mask_token(tokenizer)
    if mask_token is None:
        raise UserError(f"{where}: the tokenizer has no mask token, and a masked-LM is trained with one")
    vocabulary = rows_of(model.config) or len(tokenizer)
    text = context.data
    batches = Batches(
        text.train, plan.window or text.window, plan.windows, context.seed, True, text.begin, text.end, 0
    )
    hiding = hidden_by(tokenizer, mask_token, vocabulary, share, whole_words=whole_words, where=where)
    heads = chosen or Chosen()

    def ask(rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
        tokens = rows.cpu().numpy()
        draws = [np.random.default_rng([context.seed, moment.step, int(n)]) for n in moment.windows]
        inputs, targets = hiding(tokens, draws)
        ids, wanted = (torch.from_numpy(each).to(rows.device) for each in (inputs, targets))
        heads.places = wanted != UNKNOWN
        return Asked({"input_ids": ids}, wanted)

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        hidden, logits = targets != UNKNOWN, outputs.logits
        heads.places = None
        logits = logits if logits.dim() == 2 else logits[hidden]
        return chunked(cross_entropy, logits, targets[hidden])

    def heldout(model: Any, precision: Precision) -> float:
        return heldout_masked(model, text.heldout.tokens, mask_token, precision)

    return Objective(
        loss, ask=ask, watch=heads.watch, material=batches, heldout=heldout, notes={"hidden": share}
    )


def hidden_by(
    tokenizer: Any, mask_token: int, vocabulary: int, share: float, *, whole_words: bool, where: str
) -> Hiding:
    """What hides tokens of rows (rows, length), each by its own draws, and says what stood there.

    Raises:
        UserError: no pieces that tell which word they are of.
    """
    specials = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    continuing = follows(tokenizer, vocabulary, f"{where}.whole_words") if whole_words else None

    def hiding(tokens: Any, draws: Sequence[np.random.Generator]) -> tuple[Any, Any]:
        kept = np.isin(tokens, specials)
        words = None if continuing is None else np.cumsum(~continuing[tokens], axis=1)
        return hide(tokens, draws, mask_token, vocabulary, share, kept, words)

    return hiding


class Chosen:
    """The positions (rows, length) that a head is given; all while it is None."""

    places: Tensor | None = None

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """While the block runs, of the model's head, if that is one module."""
        head = next((part for name in _HEADS if (part := getattr(model, name, None)) is not None), None)
        if head is None:
            yield
            return

        def choose(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return given if self.places is None else (given[0][self.places], *given[1:])

        hook = head.register_forward_pre_hook(choose)
        try:
            yield
        finally:
            hook.remove()


@torch.no_grad()
def heldout_masked(model: Any, windows: Any, mask_token: int, precision: Precision) -> float:
    """Mean nats per hidden token of (n, length) windows, on the task's fixed draws."""
    asked = [MASKED.question(window, index, mask_token) for index, window in enumerate(windows)]
    device, total, count = next(model.parameters()).device, 0.0, 0
    with evaluating(model):
        for start in range(0, len(asked), _TOGETHER):
            part = asked[start : start + _TOGETHER]
            ids = torch.from_numpy(np.stack([q.inputs for q in part]).astype(np.int64)).to(device)
            with autocast(device, precision):
                logits = model(input_ids=ids).logits
            for row, question in zip(logits, part, strict=True):
                wanted = torch.from_numpy(question.targets.astype(np.int64)).to(device)
                places = torch.from_numpy(np.asarray(question.rows)).to(device)
                total += float(F.cross_entropy(row[places].float(), wanted, reduction="sum"))
                count += len(wanted)
    return total / count


def follows(tokenizer: Any, vocabulary: int, field: str) -> Any:
    """Which tokens go on with the word of the one before: (vocabulary,); none where every token is a word."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kind = type(tokenizer.backend_tokenizer.model).__name__
    begins = {"BPE": ("Ġ", "▁"), "Unigram": ("▁",)}.get(kind, ())
    found = np.zeros(max(vocabulary, len(pieces)), dtype=bool)
    for number, piece in enumerate(pieces):
        found[number] = (
            piece.startswith("##") if kind in ("WordPiece", "WordLevel") else not piece.startswith(begins)
        )
    found[tokenizer.all_special_ids] = False
    if kind not in ("WordPiece", "WordLevel", "BPE", "Unigram") or found[: len(pieces)].all():
        raise UserError(f"{field}: pieces of a {kind} tokenizer do not tell words; leave it out")
    return found
