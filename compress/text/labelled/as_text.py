"""Windows of labelled texts, for what reads text without labels.

Passes that look at activations, and exporters that check their file, read windows of one length. Where a run
has no text beside its labels, those are cut from the labelled texts: of the length that half of the training
texts have, each the beginning of one text with what the tokenizer puts around it. So what is calibrated on
looks as what the model will read, padding and all evaluation texts left out. Training on plain text reads the
training texts one after another, with the targets that are texts between them. Chats are read as the model's
template writes them, whole.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.tokenizer_files import encoding
from compress.text.documents import Document
from compress.text.examples import Examples
from compress.text.framing import Frame, frame_of
from compress.text.labelled.base import Labelled
from compress.text.labelled.encoded import LabelledData
from compress.text.windows import DataConfig, TextData, Windows, digest, stream_digest

_SHORTEST = 8  # tokens of a window


def documents_of(labelled: Labelled) -> list[Document]:
    """The training texts, as text without labels."""
    return [
        Document(f"{labelled.source}:{number}", text)
        for number, row in enumerate(labelled.train)
        for text in texts_of(row, labelled.kind)
    ]


def texts_of(row: Any, kind: str) -> list[str]:
    """The texts of a row: one or two, and what is to be written of it."""
    target = row.label if kind == "text" else None
    return [text for text in (row.text, row.pair, target) if text]


def text_of(config: DataConfig, data: LabelledData, tokenizer: Any) -> TextData:
    """Windows and a stream of the labelled texts (see the module's text).

    Raises:
        UserError: texts of one or two tokens only.
    """
    frame = data.train.frame
    around = len(frame.begin) + len(frame.end)
    lengths = sorted(len(item.ids) for item in data.train.items)
    window = min(config.window, lengths[len(lengths) // 2])
    if window < _SHORTEST:
        window = min(config.window, lengths[-1])
    if window <= around:
        raise UserError(f"labelled.source: the texts of {data.source} have no tokens; give longer ones")

    def cut(examples: Examples, count: int) -> Windows:
        return _windows(examples, window, frame, -(-count * config.window // window))

    stream, begins = _stream(data.train, tokenizer), frame_of(tokenizer)
    return TextData(
        source=data.source,
        window=window,
        train=stream,
        train_sha256=stream_digest(stream, begins),
        heldout=cut(data.deciding, config.heldout_windows),
        calibration=cut(data.train, config.calibration_windows),
        evaluation=cut(data.evaluation, config.evaluation_windows),
        begin=begins.begin,
        end=begins.end,
        labelled=data,
    )


def _windows(examples: Examples, window: int, frame: Frame, count: int) -> Windows:
    """At most `count` beginnings of texts that are long enough, (n, window), in an order that their tokens
    decide alone."""
    end = np.array(frame.end, dtype=np.int32)
    rows = {
        np.concatenate([item.ids[: window - len(end)], end]).tobytes(): None
        for item in examples.items
        if len(item.ids) >= window
    }
    if not rows:  # of the held-out part all may be shorter: what there is, again and again
        rows = {np.resize(item.ids, window).astype(np.int32).tobytes(): None for item in examples.items[-1:]}
    found = np.stack([np.frombuffer(row, dtype=np.int32) for row in rows])
    order = np.random.default_rng(len(found)).permutation(len(found))[:count]
    tokens = np.ascontiguousarray(found[order])
    return Windows(tokens, 0, digest(tokens), frame)


def _stream(examples: Examples, tokenizer: Any) -> NDArray[np.int32]:
    if examples.kind == "chat":  # the template ends each
        return np.concatenate([item.ids for item in examples.items])
    texts = [text for row in examples.rows for text in texts_of(row, examples.kind)]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    with encoding():
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array([i for ids in found for i in (*ids, *([] if end is None else [end]))], dtype=np.int32)
