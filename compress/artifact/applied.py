"""One pass applied to a bundle, outside a run: the text is cut, the place is lent, the record is kept."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from compress.artifact.labels import GivenLabels as GivenLabels
from compress.artifact.labels import labelled_for, rows_of_labels
from compress.context import Context, Original, lend
from compress.errors import UserError, staying
from compress.host.memory import peak_rss_bytes, reset_peak
from compress.host.scratch import Scratch
from compress.models.coverage import share_of
from compress.models.finite import BROKEN, numbers_of, require_finite
from compress.models.running import native_precision
from compress.models.unchanged import unchanged_process
from compress.records.manifest import Coverage, PassRecord, changed_settings
from compress.tasks.base import longest_text, rows_of
from compress.text.documents import load_documents
from compress.text.labelled.as_text import text_of
from compress.text.windows import LABELLED, DataConfig, TextData, prepare

Given = str | Path | list[str] | DataConfig
Text = Given | TextData
_Bundle = TypeVar("_Bundle", bound=Any)  # compress.Bundle, which stands above this file


class Step(Protocol):
    """A pass, as far as it is asked here."""

    @property
    def kind(self) -> str:
        """`export` changes no weights."""
        ...

    @property
    def streams(self) -> bool:
        """Whether it takes weights that are on disk, a block at a time."""
        ...

    def name(self) -> str:
        """As recipes call it."""
        ...

    def requires(self) -> frozenset[str]:
        """Of train, calibration, heldout, teacher."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Its fields."""
        ...

    def __call__(self, bundle: Any, context: Context) -> Any:
        """The changed bundle."""
        ...


def applied(
    bundle: _Bundle,
    step: Step,
    text: Text | None,
    teacher: Callable[[], Original],
    seed: int,
    labelled: GivenLabels | None = None,
) -> _Bundle:
    """A copy of `bundle` that `step` has changed, with the step in its lineage.

    The caller's threads, default dtype and generators of random numbers stay as they were.

    Args:
        bundle: stays as it is.
        step: the pass.
        text: where windows are cut from, as the `text` of a recipe; a `DataConfig` says how many of what
            length, and a `TextData` is taken as it is.
        teacher: loads the model to stay close to.
        seed: of all that is drawn by chance.
        labelled: texts with labels, of which the text is cut where none is given; a file is divided as a
            recipe of the seed 0 divides it, whatever `seed` is.

    Raises:
        UserError: the pass needs text or labels and there is none, or whatever it refuses.
    """
    if not callable(getattr(step, "layers", None)):
        raise UserError(f"step: {step!r} is no pass; give a value of one, as compress.QuantizeGPTQ()")
    if bundle.shards is not None and not step.streams:
        raise UserError(f"{step.name()}: needs all weights at once; load the model without stream=True")
    scratch = Scratch()  # exports lie in it until they are saved
    require_finite(numbers_of(bundle.model), "model")
    with unchanged_process(), staying(step.name()):
        lent, context = lend(
            step.kind, bundle, _cut(bundle, step, text, labelled), teacher,
            seed=seed, workdir=scratch.path, precision=native_precision(),
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )  # fmt: skip
        reset_peak()
        started = time.perf_counter()
        coverage = coverage_of(step, lent.model)
        result = step(lent, context)
        require_finite(numbers_of(result.model), step.name(), BROKEN)
        record = step_record(
            step, bundle, result, seconds=time.perf_counter() - started, seed=seed, coverage=coverage
        )
    lineage = bundle.lineage.model_copy(update={"steps": (*bundle.lineage.steps, record)})
    return result.evolve(lineage=lineage, scratch=(*bundle.scratch, scratch))


_CHOOSY = frozenset({"quantize", "prune", "activations", "store"})  # kinds that take some weights of all
_NAMED = 3  # places that are named of those a pass leaves


def coverage_of(step: Any, model: Any) -> Coverage | None:
    """Which share of the weights a pass takes of a model, which may be without data.

    None for passes that change all of them, or none, or their number.
    """
    if step.kind not in _CHOOSY or getattr(step, "resizes", False):
        return None
    found = share_of(model, step.layers(model))
    return Coverage(taken=found.taken, weights=found.weights, left=dict(list(found.left.items())[:_NAMED]))


def step_record(
    step: Step,
    before: Any,
    after: Any,
    *,
    seconds: float,
    seed: int,
    parent: str | None = None,
    fingerprint: str = "",
    coverage: Coverage | None = None,
) -> PassRecord:
    """What is kept of a step that has just been taken, from the bundle `before` to the one `after` it."""
    return PassRecord(
        name=step.name(),
        kind=step.kind,
        config=step.model_dump(mode="json"),
        changed=changed_settings(step),
        exports=tuple(name for name, at in after.exports.items() if before.exports.get(name) != at),
        seconds=seconds,
        coverage=coverage,
        peak_rss_bytes=peak_rss_bytes(),
        parent=parent,
        fingerprint=fingerprint,
        seed=seed,
        notes=dict(after.notes),
    )


def windows_of(text: Given, model: Any) -> DataConfig:
    """A text without settings, for a model: windows of 1024 tokens, or of all that it takes."""
    if isinstance(text, DataConfig):
        return text
    return DataConfig(text=str(text) if isinstance(text, Path) else text, window=_window(model))


def _window(model: Any) -> int:
    return min(1024, longest_text(model))


def _cut(bundle: Any, step: Step, text: Text | None, labelled: GivenLabels | None) -> TextData:
    """The windows of a recipe with these settings, and its labels; none where the pass reads none."""
    if labelled is None and isinstance(text, DataConfig):
        labelled = text.labelled
    learns = "labelled" in step.requires()
    if learns and labelled is None:
        raise UserError(f"labelled: {step.name()} needs texts with labels; give labelled='FILE'")
    own_text = isinstance(text, DataConfig) and text.text == LABELLED
    reads = sorted(step.requires() - {"teacher", "labelled"})
    data = None
    if labelled is not None and (learns or (reads and (text is None or own_text))):
        data = labelled_for(bundle.model, bundle.tokenizer, rows_of_labels(labelled))
    if not reads:
        return replace(TextData.of_tokens(8, source=""), labelled=data)
    if data is not None and (text is None or own_text):
        settings = text if isinstance(text, DataConfig) else DataConfig(window=_window(bundle.model))
        return text_of(settings, data, bundle.tokenizer)
    return replace(_windows(bundle, step, text, reads), labelled=data)


def _windows(bundle: Any, step: Step, text: Text | None, reads: list[str]) -> TextData:
    if text is None:
        raise UserError(f"text: {step.name()} needs text ({', '.join(reads)}); give text='FILE' or 'stdlib'")
    if isinstance(text, TextData):
        parts = {"train": text.train, "calibration": text.calibration.tokens, "heldout": text.heldout.tokens}
        if empty := [name for name in reads if not len(parts[name])]:
            raise UserError(
                f"text: {step.name()} needs {', '.join(empty)} tokens, and there are none; give some"
            )
        return text
    config = windows_of(text, bundle.model)
    documents = load_documents(config.text)
    training, rows = "train" in reads, rows_of(bundle.model.config)
    return prepare(config, documents, bundle.tokenizer, training=training, rows=rows)
