"""Labelled texts as they are given to a call, for a model: read, numbered as its head does, cut into tokens.

A file is divided into the parts to train on, to stop by and to judge by as a recipe of the seed 0 divides it,
or with the seed of the run that made an artifact: what is judged by was not trained on.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.artifact.folder import MANIFEST, has_manifest
from compress.errors import UserError
from compress.models.heads import numbering
from compress.records.manifest import Manifest
from compress.tasks.base import longest_text, rows_of
from compress.tasks.decisions import require_metrics
from compress.tasks.registry import task_of
from compress.tasks.sequence_classification import RELEVANCE
from compress.text.labelled.base import Labelled
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.encoded import LabelledData, encoded, paired, read_apart
from compress.text.labelled.load import load_labelled

GivenLabels = str | Path | LabelledConfig | Labelled | LabelledData


def rows_of_labels(given: GivenLabels, seed: int = 0) -> Labelled | LabelledData:
    """The rows; a file's in parts, as a run of the seed has them.

    Raises:
        UserError: as `load_labelled`.
    """
    if isinstance(given, Labelled | LabelledData):
        return given
    config = given if isinstance(given, LabelledConfig) else LabelledConfig(source=str(given))
    require_metrics("labelled")
    labelled = load_labelled(config, seed)
    require_metrics("labelled", labelled.kind)
    return labelled


def labelled_for(model: Any, tokenizer: Any, given: Labelled | LabelledData) -> LabelledData:
    """The rows as a model reads them, which may hold no data: its tokens, and its numbers of labels.

    Raises:
        UserError: the model has a head with other labels; no row is left to judge by.
    """
    if isinstance(given, Labelled):
        given = fitted(given, model.config)
    kind, names = given.kind, given.names
    embeds = task_of(model.config).embeds
    numbers, longest = numbering(model.config, kind, names), longest_text(model)
    if isinstance(given, LabelledData):
        if numbers == names:
            wanted = read_apart(kind, embeds=embeds, pairs=given.paired)
            return given.cut_by(tokenizer, longest).apart(tokenizer, longest, wanted=wanted)
        parts = given.train.rows, given.heldout.rows, given.evaluation.rows
        given = Labelled(given.source, kind, names, *parts, given.notes)  # type: ignore[arg-type]
    return encoded(given, numbers, tokenizer, longest, rows_of(model.config), embeds=embeds)


def fitted(given: Labelled, config: Any) -> Labelled:
    """Pairs with the labels 0 and 1 as pairs with numbers for a model that has one output for both, as
    rerankers (cross-encoders) have; other rows, and for other models, as they are."""
    if given.kind != "class" or given.names != RELEVANCE or task_of(config).labels != "number":
        return given
    if not paired(given.train):
        return given
    train, heldout, evaluation = (
        tuple(replace(row, label=float(str(row.label))) for row in part)
        for part in (given.train, given.heldout, given.evaluation)
    )
    return replace(given, kind="number", names=(), train=train, heldout=heldout, evaluation=evaluation)


def seed_of(artifact: Path) -> int | None:
    """The seed of the run that an artifact comes of; None for what was not made by a recipe."""
    if not has_manifest(artifact):
        return None
    try:
        steps = Manifest.read(artifact / MANIFEST).lineage.steps
    except UserError:
        return None  # whoever opens it tells
    return steps[0].seed if steps and steps[0].fingerprint else None
