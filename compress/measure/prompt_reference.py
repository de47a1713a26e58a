"""A decoder that finds labels likely after a prompt, as a row beside a model that was trained on them.

It is asked as tasks/prompted.py says, with the same template and texts, in the runtime it is for, and judged
by the same score, metrics and resampled texts. Nothing is fitted, so `rows` of the row is 0. Cost:
label_likelihood.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.artifact.folder import whole
from compress.errors import UserError
from compress.measure.label_likelihood import LabelLikelihood
from compress.measure.quality import score, summarise
from compress.models.checkpoints import load_tokenizer, meta_model
from compress.records.flips import LabelReference
from compress.runtimes import detect_runtime, open_runtime
from compress.tasks.base import longest_text
from compress.tasks.prompted import PROMPTED
from compress.tasks.registry import task_of
from compress.text.encode import asked_by
from compress.text.examples import Examples
from compress.text.prompts import Prompt

_VERSION = 1  # of what is asked: another one asks anew


def require_asked(config: Any, path: str, kind: str) -> None:
    """Refuse what is not asked by a template: a model that continues no text, labels of another kind.

    Raises:
        UserError: names the model.
    """
    if not (task := task_of(config)).continues:
        raise UserError(
            f"labelled.template: {path} is {task.noun} ({task}), and only a decoder is asked so; leave it out"
        )
    if kind != "class":
        raise UserError(
            f"labelled.template: asks for one label of a text, and these labels are of the kind '{kind}'; "
            "leave it out"
        )


def likelihood_reference(
    texts: Examples,
    prompt: Prompt,
    decoder: str,
    identity: str,
    *,
    threads: int | None = None,
    seed: int = 0,
    earlier: Sequence[LabelReference] = (),
    say: Callable[[str], None] = lambda line: None,
) -> LabelReference:
    """The row of a decoder that is asked for the labels of texts.

    Args:
        texts: to judge by, of the kind `class`.
        prompt: how it is asked.
        decoder: a directory, an artifact or an export of one, a .gguf file, a hub id.
        identity: of its files.
        threads: of the CPU.
        seed: of the resampling.
        earlier: rows of an earlier call: one of the same is taken over.
        say: gets a line before it is asked.

    Raises:
        UserError: it cannot be loaded, is no decoder, or cannot be asked so.
    """
    place = str(whole(Path(decoder)))
    model = meta_model(place)
    require_asked(model.config, decoder, texts.kind)
    examples = asked_by(texts, prompt, load_tokenizer(place), longest_text(model))
    told = f"{_VERSION} {seed} {identity} {examples.sha256}"
    fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
    if (known := next((row for row in earlier if row.fingerprint == fingerprint), None)) is not None:
        return known
    say(f"asking {decoder} for the likeliest of {len(texts.names)} labels of {len(texts)} texts")
    runtime = open_runtime(Path(decoder), detect_runtime(Path(decoder)), threads)
    forward = LabelLikelihood(runtime, examples)
    quality = summarise(score(forward, examples, task=PROMPTED), None, None, seed=seed)
    assert quality.score_name is not None
    assert quality.score is not None
    return LabelReference(
        name=f"likeliest label after a prompt, {Path(decoder).name}",
        score_name=quality.score_name, score=quality.score,
        score_ci95=quality.score_ci95, metrics=quality.metrics or {}, rows=0, fingerprint=fingerprint,
    )  # fmt: skip
