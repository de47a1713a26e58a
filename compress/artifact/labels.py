"""Labelled texts as they are given to a call, for a model: read, numbered as its head does, cut into tokens.

A file is divided into the parts to train on, to stop by and to judge by as a recipe of the seed 0 divides it,
or with the seed of the run that made an artifact: what is judged by was not trained on.
"""

from pathlib import Path
from typing import Any

from compress.artifact.folder import MANIFEST, has_manifest
from compress.errors import UserError
from compress.models.heads import numbering
from compress.records.manifest import Manifest
from compress.tasks.base import longest_text
from compress.tasks.decisions import require_metrics
from compress.text.labelled.base import Labelled
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.encoded import LabelledData, encoded
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
    kind, names = given.kind, given.names
    numbers, longest = numbering(model.config, kind, names), longest_text(model)
    if isinstance(given, LabelledData):
        if numbers == names:
            return given.cut_by(tokenizer, longest)
        parts = given.train.rows, given.heldout.rows, given.evaluation.rows
        given = Labelled(given.source, kind, names, *parts, given.notes)  # type: ignore[arg-type]
    return encoded(given, numbers, tokenizer, longest)


def seed_of(artifact: Path) -> int | None:
    """The seed of the run that an artifact comes of; None for what was not made by a recipe."""
    if not has_manifest(artifact):
        return None
    try:
        steps = Manifest.read(artifact / MANIFEST).lineage.steps
    except UserError:
        return None  # whoever opens it tells
    return steps[0].seed if steps and steps[0].fingerprint else None
