"""Text to disjoint token windows: train, held-out, calibration, evaluation, each with a hash.

Documents are put in an order that depends only on their names, and whole documents go to one part, so
that no part shares a file with another. A text of a few documents is cut at line ends (a very long line,
between words) into pieces that keep their order, and the parts are contiguous stretches of it. Evaluation
takes its share from the end, then calibration, then held-out; training gets what is left.

A window begins as the tokenizer begins every text (text/framing.py): where it writes a token first, that one
and a token less of text. Windows of training are cut when they are drawn, and begin so, too.

A tokenizer that is still to be trained sees the training share only.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import UserError
from compress.host.progress import track
from compress.host.tokenizer_files import encoding
from compress.text.documents import Document, load_documents
from compress.text.framing import NO_FRAME, Frame, frame_of, require_known
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.encoded import LabelledData
from compress.text.translation import Translation

LABELLED = "labelled"  # the name of that text
_MANY_DOCUMENTS = 64
_PIECES, _SHORTEST_PIECE, _LONGEST_PIECE = 256, 200, 4000  # characters
# of the text: what evaluation, calibration and held-out may take when a tokenizer is trained on the rest
_POOL_SHARE = 0.25
_SHINGLE = 48  # tokens that must agree in a row to count as the same text
_OVERLAP_REFUSED = 0.02
_HEADERS_REFUSED = 0.1
_BOILERPLATE = 4  # times that a run is there
_LONG_LINE = 4  # pieces' length, from which on a line is cut

Tokens = NDArray[np.int32]


class DataConfig(BaseModel):
    """The `data` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | list[str] = Field(
        "stdlib",
        description="'stdlib' (the Python library's own source), files (.txt, .md, .py, .jsonl, .parquet), "
        "folders, 'datasets:NAME[/CONFIG][:SPLIT]', or 'labelled': the training texts of `labelled`, which "
        "is the default beside that",
    )
    calibration_text: str | list[str] | None = Field(
        None, description="calibrate on other text than `text`; it must not overlap the evaluation text"
    )
    labelled: LabelledConfig | None = Field(
        None, description="texts with labels, that a model with a head is judged by and `finetune` learns"
    )
    window: int = Field(1024, ge=8, le=65536, description="tokens per window")
    evaluation_windows: int = Field(20, ge=2, le=100_000, description="that quality is measured on")
    calibration_windows: int = Field(
        32, ge=1, le=100_000, description="that quantization and pruning look at activations of"
    )
    heldout_windows: int = Field(8, ge=1, le=10_000, description="for loss curves and early stopping")

    @model_validator(mode="before")
    @classmethod
    def _labels_bring_text(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("labelled") and "text" not in given:
            return {**given, "text": LABELLED}
        return given

    @model_validator(mode="after")
    def _labelled_text_is_there(self) -> "DataConfig":
        if self.text == LABELLED and self.labelled is None:
            raise ValueError(f"text: '{LABELLED}' are the texts of data.labelled, which is not given")
        return self


@dataclass(frozen=True)
class Windows:
    """Windows of tokens that do not overlap.

    Attributes:
        tokens: int32 (n, window).
        bytes: UTF-8 bytes of the text that the predicted tokens (all but each window's first) stand for.
        sha256: of the tokens.
        frame: what every window begins and ends with that is no text.
    """

    tokens: Tokens
    bytes: int
    sha256: str
    frame: Frame = NO_FRAME

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        """Tokens of all."""
        return int(self.tokens.size)

    @property
    def length(self) -> int:
        """Tokens of each."""
        return int(self.tokens.shape[1])

    def save(self, file: Path) -> None:
        """Write the tokens as .npy."""
        np.save(file, self.tokens)

    @property
    def text(self) -> Tokens:
        """The tokens of text alone, in their order, int32 (tokens,)."""
        return self.frame.inside(self.tokens).ravel()


@dataclass(frozen=True)
class TextData:
    """The parts of a text; no token is in two of them. `begin` and `end` are what every window begins
    and ends with, those that are cut from `train` too."""

    source: str
    window: int
    train: Tokens = field(repr=False)
    train_sha256: str
    heldout: Windows
    calibration: Windows
    evaluation: Windows
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    labelled: LabelledData | None = field(default=None, repr=False)

    @classmethod
    def cut(cls, config: DataConfig, tokenizer: Any, *, training: bool = True) -> "TextData":
        """The parts of a text as a recipe with these settings has them; `training`: whether a pass trains.

        Raises:
            UserError: as `prepare`, or the text cannot be read.
        """
        return prepare(config, load_documents(config.text), tokenizer, training=training)

    @classmethod
    def of_tokens(
        cls,
        window: int,
        *,
        train: NDArray[Any] | None = None,
        heldout: NDArray[Any] | None = None,
        calibration: NDArray[Any] | None = None,
        begin: Sequence[int] = (),
        source: str = "tokens",
    ) -> "TextData":
        """Tokens that somebody else has cut: `train` (tokens,), the others (n, window); what is left out is
        empty. `begin`: what the windows begin with; it is put before those of `train`. Nothing is known of
        the bytes that they stand for, nor is there an evaluation part.
        """
        frame = Frame(tuple(begin))

        def windows(given: NDArray[Any] | None) -> Windows:
            tokens = _int32(np.zeros((0, window)) if given is None else given)
            return Windows(tokens, 0, digest(tokens), frame)

        stream = _int32(np.zeros(0) if train is None else train)
        parts = windows(heldout), windows(calibration), windows(None)
        return cls(source, window, stream, stream_digest(stream, frame), *parts, frame.begin)


def prepare(
    config: DataConfig,
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    training: bool,
    calibrating: bool = True,
    tokenizer_from_text: bool = False,
    rows: int | None = None,
) -> TextData:
    """Tokenise and cut.

    Args:
        config: the recipe's data section.
        documents: as `load_documents(config.text)` gave them.
        tokenizer: a fast tokenizer.
        training: whether a pass will train; if so the text must leave at least two windows for it.
        calibrating: whether calibration counts; if so it must not overlap evaluation.
        tokenizer_from_text: the tokenizer was trained on `training_documents`, which no window may touch.
        rows: of the model's table of tokens; the text may hold none beyond them.

    Raises:
        UserError: the text is too short for the windows asked, or calibration overlaps evaluation, or a
            token of it is beyond the model's rows.
    """
    units = _units(documents)
    untouchable = len(training_documents(documents)) if tokenizer_from_text else 0
    taker = _Taker(config, units, tokenizer, untouchable, rows)
    evaluation = taker.windows(config.evaluation_windows, "evaluation_windows")
    if config.calibration_text is None:
        calibration = taker.windows(config.calibration_windows, "calibration_windows")
    else:
        other = _Taker(config, _units(load_documents(config.calibration_text)), tokenizer, rows=rows)
        calibration = other.windows(config.calibration_windows, "calibration_windows")
    if calibrating:
        field = "text" if config.calibration_text is None else "calibration_text"
        refuse_overlap(calibration.text, evaluation.text, f"data.{field}")
    heldout = taker.windows(config.heldout_windows, "heldout_windows")
    train = taker.rest() if training else np.zeros(0, dtype=np.int32)
    if training and len(train) < 2 * config.window:
        raise UserError(
            f"data.text: {_named(config.text)} leaves {len(train)} tokens to train on; at least "
            f"{2 * config.window} are needed: give more text or fewer windows"
        )
    source, frame = _named(config.text), taker.frame
    sha256 = stream_digest(train, frame)
    return TextData(
        source, config.window, train, sha256, heldout, calibration, evaluation, frame.begin, frame.end
    )


def renumbered(data: TextData, words: Translation) -> TextData:
    """The same text in a smaller vocabulary; windows keep their length, and where tokens become pieces
    lose their end."""

    def renamed(tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(words.stream(_int32(np.array(tokens))).tolist())

    def windows(old: Windows) -> Windows:
        tokens = words.cut(old.tokens)
        frame = Frame(renamed(old.frame.begin), renamed(old.frame.end))
        return Windows(tokens, old.bytes, digest(tokens), frame)

    train, begin = words.stream(data.train), renamed(data.begin)
    return TextData(
        data.source, data.window, train, stream_digest(train, Frame(begin)), windows(data.heldout),
        windows(data.calibration), windows(data.evaluation), begin, renamed(data.end),
    )  # fmt: skip


def training_documents(documents: Sequence[Document]) -> list[Document]:
    """The documents a tokenizer may be trained on: all that evaluation cannot reach."""
    units = _units(documents)
    return units[: len(units) - _pool_size(units)]


def refuse_overlap(calibration: Tokens, evaluation: Tokens, field: str = "data.calibration_text") -> None:
    """Raise UserError when the calibration text (`Windows.text`) holds some of the evaluation text.

    Compares runs of 48 tokens, across the borders of windows, which may be shorter; up to 2 % may agree,
    since real files share licence headers. A run that both together hold four times or more is what all
    records begin with (the prompt of chats), and tells nothing of the rest, where evaluation has it more than
    once; what it has once, and calibration often, may be such a header too, but not 10 % of the text.
    `field`: what is to be mended.
    """
    length = min(_SHINGLE, calibration.size, evaluation.size)
    theirs = Counter(run.tobytes() for run in _runs(calibration, length, 1))
    own = Counter(known for run in _runs(evaluation, length, 1) if (known := run.tobytes()) in theirs)
    runs = [run.tobytes() for run in _runs(evaluation, length, _SHINGLE // 2)]
    rare = sum(run in own and own[run] + theirs[run] < _BOILERPLATE for run in runs)
    once = sum(own[run] == 1 and own[run] + theirs[run] >= _BOILERPLATE for run in runs)
    share = (rare + once) / max(len(runs), 1)
    if rare > _OVERLAP_REFUSED * len(runs) or share > _HEADERS_REFUSED:
        other = field.endswith("calibration_text")
        advice = "calibrate on other text" if other else "leave out what is there twice"
        raise UserError(
            f"{field}: {100 * share:.0f} % of the evaluation text is also in the calibration "
            f"text, which would flatter the result; {advice}"
        )


def digest(tokens: Tokens) -> str:
    """SHA-256 of tokens as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i4").tobytes()).hexdigest()


def stream_digest(tokens: Tokens, frame: Frame) -> str:
    """Of tokens from which windows with this beginning are cut."""
    return digest(np.concatenate([_int32(np.array(frame.begin)), tokens]))


class _Taker:
    """Hands out units from the end, tokenised, in their own order; each unit once."""

    def __init__(
        self,
        config: DataConfig,
        units: list[Document],
        tokenizer: Any,
        untouchable: int = 0,
        rows: int | None = None,
    ) -> None:
        self.config, self.units, self.tokenizer, self.rows = config, list(units), tokenizer, rows
        self.untouchable = untouchable  # first units that windows must leave alone
        self.pieces = len(units) - untouchable
        self.frame = frame_of(tokenizer)
        end = tokenizer.eos_token_id
        self.separator = [] if end is None else [end]

    def windows(self, count: int, what: str) -> Windows:
        """Take as many units as fill `count` windows."""
        window, room = self.config.window, self.frame.room(self.config.window)
        need = count * room
        taken: list[tuple[Tokens, Tokens]] = []
        have, before = 0, self.pieces + self.untouchable - len(self.units)
        while have < need and len(self.units) > self.untouchable:
            taken.append(self._encode(self.units.pop()))
            have += len(taken[-1][0])
        if have < need:
            gone = f" after {before} of {self.pieces} pieces went to other windows" if before else ""
            raise UserError(
                f"data.{what}: {count} windows of {window} tokens need {need} tokens, but "
                f"{_named(self.config.text)} has {have}{gone}: give more text, or a smaller data.{what} "
                "or data.window"
            )
        text = np.concatenate([ids for ids, _ in reversed(taken)])[:need].reshape(count, room)
        lengths = np.concatenate([size for _, size in reversed(taken)])[:need].reshape(count, room)
        tokens = self.frame.around(text)
        first = 0 if self.frame.begin else 1  # of the text, what is predicted
        return Windows(tokens, int(lengths[:, first:].sum()), digest(tokens), self.frame)

    def rest(self) -> Tokens:
        """All that is left, as one stream."""
        parts: list[Tokens] = []
        left, self.units = self.units, []
        with track(sum(len(u.text) for u in left), "tokenising", "characters") as progress:
            for start in range(0, len(left), 256):
                batch = left[start : start + 256]
                texts = [u.text for u in batch]
                with encoding():
                    encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
                for unit, ids in zip(batch, encoded, strict=True):
                    parts.append(self._known(unit, ids + self._end(unit)))
                progress.advance(sum(len(text) for text in texts))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def _end(self, unit: Document) -> list[int]:
        return self.separator if unit.ends else []

    def _known(self, unit: Document, ids: list[int]) -> Tokens:
        """The tokens of a unit; the model has a row for each."""
        if self.rows is not None:
            require_known(ids, self.rows, f"text: '{unit.name}'", self.tokenizer.convert_ids_to_tokens)
        return np.array(ids, dtype=np.int32)

    def _encode(self, unit: Document) -> tuple[Tokens, Tokens]:
        """Token ids and the bytes of text each stands for; a separator stands for none."""
        with encoding():
            encoded = self.tokenizer(
                unit.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        # position of every character in bytes; one character may be split over several tokens, whose
        # spans then coincide: each counts from the furthest end so far. White space that a tokenizer drops
        # counts with what comes after it, and at the end of a text with what comes before
        widths = np.frombuffer(unit.text.encode("utf-32-le"), dtype="<u4")
        sizes = 1 + (widths > 0x7F) + (widths > 0x7FF) + (widths > 0xFFFF)
        position = np.concatenate(([0], np.cumsum(sizes)))
        ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        if len(ends):
            ends = np.maximum.accumulate(position[ends])
            ends[-1] = position[-1]
        lengths = np.diff(ends, prepend=0)
        end = self._end(unit)
        ids = self._known(unit, encoded["input_ids"] + end)
        return ids, np.concatenate((lengths, np.zeros(len(end)))).astype(np.int32)


def _int32(tokens: NDArray[Any]) -> Tokens:
    return np.ascontiguousarray(tokens, dtype=np.int32)


def _units(documents: Sequence[Document]) -> list[Document]:
    """Documents in an order set by their names; a few long ones cut into pieces that keep their order."""
    if len(documents) >= _MANY_DOCUMENTS:
        return sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    total = sum(len(document.text) for document in documents)
    size = min(max(total // _PIECES, _SHORTEST_PIECE), _LONGEST_PIECE)
    return [piece for document in documents for piece in _pieces(document, size)]


def _pieces(document: Document, characters: int) -> list[Document]:
    pieces, lines, size = [], [], 0
    for line in _lines(document.text, characters):
        lines.append(line)
        size += len(line)
        if size >= characters:
            pieces.append("".join(lines))
            lines, size = [], 0
    if lines:
        pieces.append("".join(lines))
    last = len(pieces) - 1
    return [Document(f"{document.name}#{i}", text, ends=i == last) for i, text in enumerate(pieces)]


def _lines(text: str, characters: int) -> Iterator[str]:
    """Its lines; very long ones in parts, between words where there are any."""
    for line in text.splitlines(keepends=True):
        start = 0
        while len(line) - start > _LONG_LINE * characters:
            space = line.rfind(" ", start + characters // 2, start + characters)
            end = start + characters if space < 0 else space
            yield line[start:end]
            start = end
        yield line[start:]


def _pool_size(units: Sequence[Document]) -> int:
    limit = _POOL_SHARE * sum(len(unit.text) for unit in units)
    taken = 0
    for index, unit in enumerate(reversed(units)):
        taken += len(unit.text)
        if taken > limit:
            return index
    return len(units)


def _runs(windows: Tokens, length: int, stride: int) -> list[Tokens]:
    stream = windows.ravel()
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, stride)]


def _named(text: str | list[str]) -> str:
    return text if isinstance(text, str) else ", ".join(text)
