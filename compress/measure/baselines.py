"""Simple models beside a base that was trained here: fitted on its text, scored on its windows, and kept.

Method. Each is fitted on the very tokens that trained the base (ngrams.py), or trained as the base was
(recurrent.py), and scored by the same rule. What was fitted is known by a hash of what decides its numbers:
text, windows, settings, code and libraries. What an earlier call fitted is taken over, be it finished or cut
off, so a kill loses the one model that was being fitted.

Limits: only for models that continue text. A base that goes on from a checkpoint has seen text that nobody
here knows, so no recurrent model is its equal.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from compress.errors import UserError
from compress.host.progress import clock
from compress.host.reach import reach
from compress.measure.ngrams import KneserNey, Unigram
from compress.measure.recurrent import parameters_of, train_recurrent, width_for
from compress.models.running import native_precision
from compress.records.manifest import PassRecord
from compress.records.results import Result
from compress.records.run import Reference, ReferenceBook, ReferenceName
from compress.tasks.base import rows_of
from compress.tasks.registry import task_of
from compress.text.windows import TextData

Say = Callable[[str], None]


class _Model(Protocol):
    def window_nll(self, windows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Nats per predicted token: int [n, window] -> float64 [n, window - 1]."""
        ...


@dataclass(frozen=True)
class Training:
    """How a base was trained, as far as a recurrent model can be trained alike.

    Attributes:
        parameters: of the base.
        tokens: that it was trained on, over all steps of its chain.
        batch: windows per step.
        window: inputs per window.
        seed: of weights and order.
    """

    parameters: int
    tokens: int
    batch: int
    window: int
    seed: int

    @classmethod
    def of(
        cls, steps: Sequence[PassRecord], *, parameters: int | None, window: int, seed: int
    ) -> Training | None:
        """By the records of a chain; batch and window are those of its first step that trained, `window`
        where that names none. None of a chain that begins with a checkpoint or never trains."""
        trained = [step for step in steps if step.curve() and isinstance(step.notes.get("tokens"), int)]
        if not trained or parameters is None or "checkpoint" in steps[0].config:
            return None
        config = trained[0].config
        batch = int(config.get("batch") or 1) * int(config.get("accumulate") or 1)
        tokens = sum(step.notes["tokens"] for step in trained)
        return cls(parameters, tokens, batch, int(config.get("window") or window), seed)


def references_beside(
    steps: Sequence[PassRecord],
    config: Any,
    results: Iterable[Result],
    data: TextData,
    wanted: Sequence[ReferenceName],
    *,
    seed: int,
    earlier: Sequence[Reference],
    kept: Path,
    say: Say,
) -> list[Reference]:
    """Those beside a base that came by `steps` to a `transformers` configuration and measured `results`; none
    beside one that does not continue text, nor of windows of labelled texts, whose bytes are not known."""
    if not task_of(config).continues or not data.evaluation.bytes:
        return []
    parameters = next((r.parameters for r in results if r.variant == "base" and r.parameters), None)
    training = Training.of(steps, parameters=parameters, window=data.window, seed=seed)
    return fit_references(wanted, data, rows_of(config) or 0, training, earlier=earlier, kept=kept, say=say)


def fit_references(
    wanted: Sequence[ReferenceName],
    data: TextData,
    vocabulary: int,
    training: Training | None,
    *,
    earlier: Sequence[Reference] = (),
    kept: Path | None = None,
    say: Say = lambda line: None,
) -> list[Reference]:
    """The wanted ones in their order; none where no text was trained on.

    Args:
        vocabulary: rows of the base's table; there are more where the text has other tokens.
        training: of the base; None where no recurrent model would be its equal.
        earlier: those of a run before, and `kept`: a file for those of one that is cut off.
        say: gets a line for what takes long.
    """
    if not len(data.train):
        return []
    rows = max(vocabulary, 1 + int(data.train.max()), 1 + int(data.evaluation.tokens.max()))
    known = {reference.fingerprint: reference for reference in (*_read(kept), *earlier)}
    found: list[Reference] = []
    for name in dict.fromkeys(wanted):
        if name == "lstm" and training is None:
            continue
        mark = _fingerprint(name, data, rows, training)
        reference = known.get(mark) or _fit(name, data, rows, training, mark, say)
        if reference is not None:
            found.append(reference)
            if kept is not None:
                ReferenceBook(references=found).write(kept)
    return found


def _fit(
    name: ReferenceName, data: TextData, rows: int, training: Training | None, mark: str, say: Say
) -> Reference | None:
    if name == "unigram":
        return _scored("unigram", Unigram.fit(data.train, rows), data, len(data.train), mark)
    if name == "trigram":
        return _scored("Kneser-Ney trigram", KneserNey.fit(data.train, rows), data, len(data.train), mark)
    assert training is not None
    parameters = parameters_of(rows, width_for(training.parameters, rows))
    say(f"LSTM reference: {parameters:,} parameters, {training.tokens:,} tokens (report.references names it)")
    began = time.monotonic()
    model, tokens = train_recurrent(
        data.train, rows, training.parameters, tokens=training.tokens, batch=training.batch,
        window=training.window, begin=data.begin, seed=training.seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )  # fmt: skip
    reference = _scored("LSTM", model, data, tokens, mark, parameters)
    said = clock(time.monotonic() - began)
    said += "" if reference is not None else "; left out, since its training diverged"
    say(f"LSTM reference: {said}")
    return reference


def _scored(
    name: str, model: _Model, data: TextData, tokens: int, mark: str, parameters: int | None = None
) -> Reference | None:
    """A row; None where a likelihood is no number."""
    nats = model.window_nll(data.evaluation.tokens)
    nll = float(nats.mean())
    if not nll < math.log(np.finfo(np.float64).max):
        return None
    bits = float(nats.sum()) / (math.log(2.0) * data.evaluation.bytes)
    return Reference(
        name=name, nll=nll, perplexity=math.exp(nll), bits_per_byte=bits, parameters=parameters,
        tokens=tokens, fingerprint=mark,
    )  # fmt: skip


def _fingerprint(name: ReferenceName, data: TextData, rows: int, training: Training | None) -> str:
    """SHA-256 of what decides a reference's numbers."""
    windows = data.evaluation
    facts: list[Any] = [name, data.train_sha256, windows.sha256, windows.bytes, rows, reach(__name__).digest]
    if name == "lstm" and training is not None:
        facts += [asdict(training), native_precision()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read(kept: Path | None) -> list[Reference]:
    """What was kept; nothing where there is no file, or one of another version."""
    with suppress(UserError):
        return ReferenceBook.read(kept).references if kept is not None and kept.exists() else []
    return []
