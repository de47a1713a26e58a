"""Quality of a model on windows of text: likelihood, and distance to the base model.

Definitions (DESIGN section 7). Windows do not overlap; a window of L tokens predicts its tokens 2 .. L
from those before them *inside the window*, so L - 1 predictions, and the first token is not predicted.

    nll            = mean over predicted tokens of -ln p(token), in nats
    perplexity     = exp(nll), None where that is beyond a float64
    bits_per_byte  = total nats / (ln 2 * UTF-8 bytes of the predicted tokens' text)
    delta_nll      = nll - nll of the base model
    kl_to_base     = mean over predicted positions of KL(p_base || p_variant) over the full vocabulary
    top1_agreement = share of predicted positions where both models have the same argmax

A variant of a smaller vocabulary (text/translation.py) is scored on the same text in its own tokens. Its loss
stays per predicted token of the base; KL and agreement are over the rows that both have, the base's
distribution normalised over them, and absent where a token had to be written in pieces. What a model is asked
then is told there.

Of chats a decoder predicts the tokens of answers, with those that end them, from all of the chat before;
bits_per_byte is left out.

An encoder-decoder reads the first half of a window, L // 2 tokens, and predicts those of the second, each
from the first half and what comes before it in the second; bits_per_byte is left out.

An encoder-decoder reads the whole source of a labelled row and predicts its target's tokens; what it writes
of the source by itself is judged, too (tasks/written.py, written.py).

A model with a head for labels is judged by those of texts (tasks/sequence_classification.py) or words
(tasks/token_classification.py); nll is then of the right label, and windows are texts. One that finds
answers in contexts is judged by these (tasks/question_answering.py).

An encoder with a masked-LM head predicts tokens that are hidden from it (tasks/masked.py), and one with a
next-sentence head (tasks/next_sentence.py) those of pairs; the definitions above then hold over those.
bits_per_byte is left out. A model that embeds is judged by the mean of its last hidden states over a window
(tasks/embedding.py).

What is summed over a window, and what the sums come to, is the task's to say (`Task.scoring`: the mathematics
of the above is in tasks/likelihood.py); here windows go through the model, and their sums are added up.

Cost: a window's logits [L - 1, V] (200 MB for 1024 x 49 k) from the runtime; where the
runtime lets them, windows of small logits go through it several at a time, so that layers which unpack codes
in every call do so less often. Scoring
goes over chunks of positions of about 1 MB, which a core's cache holds, in `threads` threads (numpy releases
the lock). The base model's logits are written, one float32 .npy file per window, and read memory-mapped;
whoever asks for a few windows at a time (`part`) needs the disk for those alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compress.errors import UserError
from compress.measure.statistics import mean_interval, paired_interval, statistic_interval
from compress.tasks.base import Question, Task
from compress.tasks.causal import CAUSAL
from compress.tasks.likelihood import LIKELIHOOD
from compress.tasks.registry import task_named
from compress.tasks.retrieval import packed
from compress.tasks.scoring import Decided, Scoring, Weighted
from compress.text.examples import Examples
from compress.text.translation import TranslatedWindows

if TYPE_CHECKING:  # records would be in a worker's memory
    from compress.records.base import Interval

Logits = npt.NDArray[np.float32]
# int32 [n, length], and where texts are told apart their types as well -> float32 [n, length, V]; `text`
# [n, targets]: what is written of them
Forward = Callable[..., Logits]

CHUNK_ELEMENTS = 250_000  # 255 positions of 4096 with a base: 3.5 ms, and 4.6 in one chunk (an AMD EPYC)
TOGETHER_BYTES = 32_000_000  # of logits that one call of a model may give, where a window does not give more


@dataclass(frozen=True)
class Scores:
    """Per-window sums, each list [windows]: nats, predicted tokens and, against the base, KL and
    agreements. Of a model that embeds: `distances` alone, cosine distances to the base. Of labels besides,
    per text a list of what was decided, what was right, and how sure the model was (`Decided` of
    tasks/scoring.py); and the labels' names. Of targets that are texts: what was written and whether it
    ended, and what is right."""

    nats: list[float]
    tokens: list[int]
    kl: list[float] | None = None
    agreements: list[int] | None = None
    distances: list[float] | None = None
    task: str = CAUSAL.name  # whose sums they are
    decisions: list[list[float]] | None = None
    targets: list[list[float]] | None = None
    confidences: list[list[float]] | None = None
    names: Sequence[str] = ()
    vectors: list[str] | None = None  # of texts that are compared with one another, packed
    pairs: Sequence[Sequence[float]] = ()  # of such texts (text/encode.py)
    groups: Sequence[int] = ()  # the query that each text is a candidate of
    written: list[tuple[str, bool]] | None = None
    wanted: list[str] | None = None

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Those of windows that were scored part by part."""

        def lists(name: str) -> Any:
            columns = [getattr(part, name) for part in parts]
            return None if columns[0] is None else [value for column in columns for value in column]

        others = ("task", "names", "pairs", "groups")
        names = [column.name for column in fields(cls) if column.name not in others]
        return cls(**{name: lists(name) for name in names}, **{n: getattr(parts[0], n) for n in others})

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for the pipe between processes."""
        return asdict(self)

    def quality(self, base: Scores | None, text_bytes: int | None) -> Quality:
        """Means and intervals, as `summarise`; `base`: of the base model, None for itself."""
        return summarise(self, base, text_bytes)


@dataclass(frozen=True)
class Quality:
    """The quality fields of a `Result`, by their names there."""

    nll: float | None = None
    nll_ci95: Interval | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    delta_nll: float | None = None
    delta_nll_ci95: Interval | None = None
    kl_to_base: float | None = None
    kl_ci95: Interval | None = None
    top1_agreement: float | None = None
    cosine_distance: float | None = None
    cosine_ci95: Interval | None = None
    score_name: str | None = None
    score: float | None = None
    score_ci95: Interval | None = None
    delta_score: float | None = None
    delta_score_ci95: Interval | None = None
    metrics: dict[str, float] | None = None
    flips: float | None = None
    flips_lost: float | None = None
    flips_gained: float | None = None


def score(
    forward: Forward,
    windows: npt.NDArray[np.int32] | Examples,
    *,
    base: Path | None = None,
    keep: Path | None = None,
    threads: int = 1,
    together: int = 1,
    task: Task = CAUSAL,
    mask_token: int | None = None,
    translated: TranslatedWindows | None = None,
    part: range | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Score int32 [n, L] windows, or texts with labels.

    `forward` gives a model's logits. `base`: folder of base logits to compare with; `keep`: folder to
    write this model's logits to, so that it becomes such a base. `together`: how many windows one call of
    `forward` may take. `translated`: the windows in the model's own vocabulary, if that is another. `part`:
    which of the windows; all if None.
    `advance` is called after every window.
    Raises ValueError where the two vocabularies or the windows differ, UserError for a full disk,
    FloatingPointError for logits that are not finite.
    """
    scoring, tokens, found = task.scoring, [], []
    decided: list[Decided | None] = []
    vectors: list[str] = []
    rows = None if translated is None else translated.rows
    if translated is not None and task.predicts and rows is None:
        base = None  # its positions are others
    theirs: dict[int, npt.NDArray[np.int32]] = {}  # targets in the vocabulary that tokens are counted in

    def ask(index: int) -> Question:
        if translated is not None and not isinstance(windows, Examples):
            window = task.window(windows, index)
            asked, theirs[index] = translated.question(task, window, index, mask_token)
            return asked
        if isinstance(windows, Examples):
            return task.asked(windows[index])
        return task.question(task.window(windows, index), index, mask_token)

    part = range(len(windows)) if part is None else part
    answered = _answered(forward, map(ask, part), together)
    for index, (asked, answer) in zip(part, answered, strict=True):
        logits = scoring.kept(answer[asked.rows])  # [predictions, V]
        reference = None if base is None else np.load(_file(base, index), mmap_mode="r")
        if reference is not None and rows is not None and task.predicts:
            reference = np.take(reference, rows, axis=1)
        if reference is not None and task.embeds and reference.shape != logits.shape:
            reference = None  # vectors of another width have no angle to these
        if reference is not None and reference.shape != logits.shape:
            raise ValueError(f"logits are {logits.shape}, those of the base {reference.shape}: no comparison")
        sums = score_window(logits, asked.targets, reference, threads, scoring)
        if not np.isfinite(logits).all() or not np.isfinite(sums).all():
            raise FloatingPointError(f"the logits of window {index} are not finite: the model is broken")
        found.append(sums)
        decided.append(task.decided(logits, asked))
        if isinstance(windows, Examples) and windows.pairs:
            vectors.append(packed(logits))
        tokens.append(scoring.counted(theirs.get(index, asked.targets)))
        if keep is not None:
            if index == part.start:
                _require_room(keep, len(part) * logits.nbytes)
            _save(_file(keep, index), logits)
        advance()
    columns = scoring.columns(found, compared=base is not None)
    names = windows.names if isinstance(windows, Examples) else ()
    columns = {**columns, **_decided(decided)}
    if isinstance(windows, Examples):
        columns |= {"pairs": windows.pairs, "groups": windows.groups}
        columns |= {"vectors": vectors} if windows.pairs else {}
    return Scores(**columns, tokens=tokens, task=task.name, names=names)


def _decided(found: Sequence[Decided | None]) -> dict[str, Any]:
    """The columns of decisions, where every text has some."""
    known = [each for each in found if each is not None]
    if not known or len(known) < len(found):
        return {}
    return {name: [getattr(each, name) for each in known] for name in Decided._fields}


def _answered(
    forward: Forward, questions: Iterable[Question], together: int
) -> Iterator[tuple[Question, Logits]]:
    """Each question with the model's whole answer to it [length, V].

    The first tells how large an answer is, and so how many neighbours of one length, up to `together`, go
    through at once.
    """
    waiting: list[Question] = []
    size = 1
    for asked in questions:
        if waiting and (len(waiting) == size or not _alike(asked, waiting[0])):
            answers = _ask_together(forward, waiting)
            yield from zip(waiting, answers, strict=True)
            size = max(1, min(together, TOGETHER_BYTES // answers[0].nbytes))
            waiting = []
        waiting.append(asked)
    if waiting:
        yield from zip(waiting, _ask_together(forward, waiting), strict=True)


def _alike(one: Question, other: Question) -> bool:
    def shape(asked: Question) -> tuple[int, int, bool]:
        return len(asked.inputs), 0 if asked.text is None else len(asked.text), asked.types is None

    return shape(one) == shape(other)


def _ask_together(forward: Forward, questions: Sequence[Question]) -> Logits:
    types = [asked.types for asked in questions if asked.types is not None]
    given = (np.stack([asked.inputs for asked in questions]), *([np.stack(types)] if types else []))
    written = [asked.text for asked in questions if asked.text is not None]
    return forward(*given, **({"text": np.stack(written)} if written else {}))


def score_window(
    logits: Logits,
    targets: npt.NDArray[Any],
    base: Logits | None = None,
    threads: int = 1,
    scoring: Scoring = LIKELIHOOD,
) -> tuple[float, ...]:
    """The scoring's sums, (nats, KL, agreements) by default, over logits [P, V], targets [P], base [P, V]."""
    positions, vocabulary = logits.shape
    step = max(1, CHUNK_ELEMENTS // vocabulary)

    def part(start: int) -> tuple[float, ...]:
        rows = slice(start, start + step)
        return scoring.sums(logits[rows], targets[rows], None if base is None else base[rows])

    starts = range(0, positions, step)
    if threads == 1 or len(starts) == 1:
        parts = [part(start) for start in starts]
    else:
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(part, starts))
    return tuple(sum(column) for column in zip(*parts, strict=True))


def summarise(scores: Scores, base: Scores | None, text_bytes: int | None, *, seed: int = 0) -> Quality:
    """Means and paired 95 % intervals. `base`: None for the base model itself; `text_bytes` as in the module,
    None where tokens stand for more than text.

    All intervals use the same resampled windows (same seed).
    Raises ValueError for scores of a task that is not registered.
    """
    task = task_named(scores.task)
    if task is None:
        raise ValueError(f"task: '{scores.task}' is unknown; add it to tasks/registry.py")

    found = task.scoring.summary(
        asdict(scores),
        None if base is None else asdict(base),
        text_bytes if task.continues else None,  # where some tokens only are predicted, it is of no text
        _Resampling(scores.tokens, seed),
    )
    return Quality(**found)


@dataclass(frozen=True)
class _Resampling:
    """Intervals over windows of so many tokens, or texts of so many decisions."""

    tokens: Sequence[int]
    seed: int

    def __call__(
        self, sums: Sequence[float], base: Sequence[float] | None = None, /
    ) -> tuple[float, float] | None:
        if base is None:
            return mean_interval(sums, self.tokens, seed=self.seed)
        return paired_interval(sums, base, self.tokens, seed=self.seed)

    def of(self, statistic: Weighted, blocks: int | None = None, /) -> tuple[float, float] | None:
        return statistic_interval(statistic, len(self.tokens) if blocks is None else blocks, seed=self.seed)


def _save(file: Path, logits: Logits) -> None:
    try:
        np.save(file, logits)
    except OSError as error:  # full in spite of the estimate: somebody else writes too
        raise UserError(
            f"{file.parent}: the base model's logits cannot be written ({error}); free some space, run again"
        ) from None


def _require_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{folder}: the base model's logits need {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "free some space, or measure on fewer windows"
        )


def _file(folder: Path, index: int) -> Path:
    return folder / f"window-{index:05d}.npy"


def forget(folder: Path, part: range) -> None:
    """Remove the base logits of these windows."""
    for index in part:
        _file(folder, index).unlink(missing_ok=True)
