"""quantize_rare_rows: rows of the token table that the text hardly uses, in fewer bits.

Most of a small encoder's file is its table, and most of the table is hardly looked up. Tokens are ordered by
how often the recipe's text has them; the fewest that make up `coverage` of it, and special tokens, keep their
codes, and the rows of the others are rounded to `format`. Comes after a quantizer that gave the table codes.

A row's error counts as often as it is looked up: of rows that one token in ten thousand needs, the whole
text's mean error is hardly touched. What that costs, a measurement tells, since the evaluation may have
tokens that this text lacks.

Limits: encoders whose head is no table of tokens. The places of rows take four bytes per token.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.formats import AnyFormat, Format, Int4, QuantizedEmbedding
from compress.formats.split import SplitEmbedding
from compress.formats.swap import tables
from compress.models.layers import replace_module
from compress.models.special import special_ids
from compress.passes.base import Kind, Need, Pass
from compress.tasks.base import Task
from compress.tasks.registry import TASKS


class QuantizeRareRows(Pass):
    """Rows of the token table that the text hardly uses, in fewer bits."""

    kind: ClassVar[Kind] = "quantize"
    needs: ClassVar[frozenset[Need]] = frozenset({"train", "calibration"})
    only_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    tasks: ClassVar[frozenset[Task]] = frozenset(task for task in TASKS if not task.writes)

    format: AnyFormat = Field(Int4(group=32), description="of rows that are hardly used")
    coverage: float = Field(
        0.999, gt=0, lt=1, description="share of the text's tokens whose rows keep their codes"
    )

    def followed_by(self, later: Sequence[Pass]) -> Pass:
        """Itself; raises ValueError where a checkpoint of one table is to be written of it."""
        if any(step.name() == "export_compressed_tensors" for step in later):
            raise ValueError("export_compressed_tensors takes one table of tokens; leave one of the two out")
        return self

    def layers(self, model: nn.Module) -> list[str]:
        """The token table.

        Raises:
            UserError: a head that predicts tokens multiplies by it.
        """
        whole: Any = model
        if whole.get_output_embeddings() is not None:
            raise UserError(
                "quantize_rare_rows: the head gives logits of tokens and needs the table whole; "
                "leave the pass out, or take out rows with prune_vocabulary"
            )
        return list(tables(model))

    def writes(self) -> tuple[Format, ...]:
        """The format of rare rows."""
        return (self.format,)

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Split the table of a copy; notes tell how many rows are rare, and what share of the text they are.

        Raises:
            UserError: the table holds no codes.
        """
        result = bundle.clone()
        name, *others = self.layers(result.model)
        table = result.model.get_submodule(name)
        if others:
            raise UserError("quantize_rare_rows: the table is in two formats already; take the pass once")
        if not isinstance(table, QuantizedEmbedding) or table.scale != 1.0:
            raise UserError(
                f"quantize_rare_rows: '{name}' holds no codes that are looked up as they are; give the "
                "quantizer before it `embeddings`"
            )
        data, rows = context.data, table.num_embeddings
        text = np.concatenate([data.calibration.tokens.ravel(), data.train])
        counts = np.bincount(text, minlength=rows)[:rows]
        order = np.argsort(-counts, kind="stable")
        before = np.cumsum(counts[order]) - counts[order]  # of the text, by more frequent tokens
        often = np.zeros(rows, dtype=bool)
        often[order] = before < self.coverage * counts.sum()
        often[[token for token in special_ids(result.model) if token < rows]] = True
        often[[token for token in bundle.tokenizer.all_special_ids if token < rows]] = True
        if often.all():
            raise UserError(
                f"quantize_rare_rows.coverage: {self.coverage} of the text needs all {rows:,} rows; "
                "give a smaller share, or leave the pass out"
            )
        split = SplitEmbedding.of(table, torch.from_numpy(often), self.format)
        replace_module(result.model, name, split)
        notes = {
            "rows": rows,
            "rare_rows": int((~often).sum()),
            "share_of_text": float(counts[~often].sum() / max(1, counts.sum())),
            "format": self.format.model_dump(),
        }
        return result.evolve(exports={}, notes=notes)
