"""prune_vocabulary: rows of embedding and head that a text never uses, and their tokens.

In a small model the embedding is a quarter to a half of the file. What goes is known from the recipe's own
text (training, calibration and held-out parts) or from files of yours; the tokenizer (BPE with bytes,
WordPiece, Unigram) is rewritten so that text that could be written still can and text like the counted one is
cut as before (structured/vocabulary.py says why). All tables of a model go together: embedding, head, the
bias of an encoder's head, the shared table of an encoder-decoder. The logits of the tokens that stay are what
they were. Cost: counting the text; no computation.

Measured afterwards on the same text: loss per token of the base, so that it is comparable even where a token
has to be written in pieces. KL and agreement are over the rows that both have, and absent where pieces make
the positions differ. An encoder-decoder cannot be measured on text with a token in pieces, and says so: name
the whole text under `text`.
"""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.models.special import special_ids
from compress.passes.base import Kind, Need, Pass
from compress.structured.vocabulary import (
    fewer_rows,
    kept_tokens,
    require_trimmable,
    trimmed_tokenizer,
)
from compress.tasks.base import Task
from compress.tasks.registry import TASKS, task_of
from compress.text.documents import load_documents


class PruneVocabulary(Pass):
    """Remove vocabulary rows that a text does not use; rewrite the tokenizer to match."""

    kind: ClassVar[Kind] = "prune"
    needs: ClassVar[frozenset[Need]] = frozenset({"train", "calibration", "heldout"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    tasks: ClassVar[frozenset[Task]] = TASKS
    in_base: ClassVar[bool] = False  # the base's tokenizer is what text is cut with

    text: tuple[str, ...] = Field(
        (),
        description="files or folders whose tokens stay, in the place of the recipe's training text; "
        "those of calibration and held-out text stay in any case",
    )
    min_count: int = Field(1, ge=1, description="tokens used less often go, too")

    def layers(self, model: nn.Module) -> list[str]:
        """Embedding and head; of two stacks, the embedding of each."""
        whole: Any = model
        found = [whole.get_input_embeddings(), whole.get_output_embeddings()]
        if task_of(whole.config).stacks > 1:
            found += [whole.get_encoder().get_input_embeddings(), whole.get_decoder().get_input_embeddings()]
        return [name for name, module in model.named_modules() if any(module is m for m in found)]

    def texts(self) -> tuple[str, ...]:
        """That whose tokens stay."""
        return self.text

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Trim a copy; notes tell the rows and bytes removed, and the share of the text's tokens that stay.

        Raises:
            UserError: a tokenizer that could lose text, or one with tokens that the model has no rows for.
        """
        require_trimmable(bundle.tokenizer)
        rows = bundle.model.get_input_embeddings().weight.shape[0]
        counts = self._counts(bundle, context, rows)
        used = np.flatnonzero(counts >= self.min_count).tolist()
        kept = kept_tokens(bundle.tokenizer, {*used, *special_ids(bundle.model)})
        if kept[-1] >= rows:
            raise UserError(
                f"prune_vocabulary: token {kept[-1]} of the tokenizer "
                f"({bundle.tokenizer.convert_ids_to_tokens(kept[-1])!r}) is beyond the model's {rows} rows; "
                "take it out of the tokenizer, or give the model rows for it"
            )
        before = sum(p.numel() for p in bundle.model.parameters())
        model = fewer_rows(bundle.model, kept)
        after = sum(p.numel() for p in model.parameters())
        rowed = self.layers(bundle.model)
        masks = {name: mask[kept] if name in rowed else mask for name, mask in bundle.masks.items()}
        notes = {
            "rows": rows,
            "rows_kept": len(kept),
            "rows_removed": rows - len(kept),
            "parameters_removed": before - after,
            "bytes_removed": 4 * (before - after),
            "tokens_covered": float(counts[kept].sum() / counts.sum()),
            "gain": "smaller" if len(kept) < rows else "no gain: the text uses or needs every row",
        }
        return Bundle(model, trimmed_tokenizer(bundle.tokenizer, kept), bundle.lineage, masks, notes=notes)

    def _counts(self, bundle: Bundle, context: Context, rows: int) -> NDArray[np.int64]:
        """How often each token is used, int64 (rows,)."""
        data = context.data
        parts = [data.calibration.tokens.ravel(), data.heldout.tokens.ravel()]
        if self.text:
            for document in load_documents(self.text):
                ids = bundle.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
                parts.append(np.array(ids, dtype=np.int32))
        else:
            parts.append(data.train)
        return np.bincount(np.concatenate(parts), minlength=rows)
