"""The base model's logits on the evaluation windows, some windows at a time.

`kl_to_base` wants the whole distribution of the base at every position. A fresh process loads the base
artifact in torch, scores a part of the windows and leaves one float32 .npy per window in a temporary folder;
every variant's process maps these files; then they go, and the next part comes. Cost: a gigabyte of disk, or
that of one window's logits where these take more, whatever the vocabulary and however long the text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifact.folder import whole
from compress.host.scratch import Scratch
from compress.measure.process import WorkerProcess
from compress.measure.quality import Scores, forget
from compress.measure.written import how_to_write
from compress.models.checkpoints import load_tokenizer, meta_model
from compress.records.protocol import LOGITS_BYTES, MeasureProtocol
from compress.tasks.base import longest_text
from compress.text.encode import cut_by
from compress.text.examples import BY_TOKEN, SPAN, Examples
from compress.text.translation import TranslatedWindows, Translation, translation
from compress.text.windows import Windows


class Reference:
    """Evaluation windows, and the base model's logits on them; a context manager that owns the files.

    `base`: the base model's artifact, or None where there is nothing to compare with. `workdir`: an
    existing folder on a disk with room; default: the system's temporary folder. `answer_tokens`: of each text
    that is written of a labelled source, at most.
    """

    def __init__(
        self,
        base: Path | None,
        windows: Windows | Examples,
        workdir: Path | None = None,
        answer_tokens: int = MeasureProtocol().answer_tokens,
    ) -> None:
        self.base, self.windows = base, windows
        self._answer_tokens = answer_tokens
        self._parts: dict[int, Scores] = {}
        self._workdir = workdir
        self._words: dict[Path, Translation | None] = {}
        self._cut: dict[Path, Path] = {}  # artifact -> file of the texts as its tokenizer cuts them
        self._others: set[Path] = set()  # artifacts whose answers are of other positions than the base's
        self._folder: Path | None = None
        self._scratch: Scratch | None = None

    def __enter__(self) -> Reference:
        self._scratch = Scratch(self._workdir)
        self._folder = self._scratch.path
        self.windows.save(self.windows_file)
        return self

    def __exit__(self, *_: object) -> None:
        if self._scratch is not None:
            self._scratch.remove()

    @property
    def folder(self) -> Path:
        """Where this measurement keeps its files."""
        if self._folder is None:
            raise RuntimeError("use the reference in a with statement")
        return self._folder

    @property
    def windows_file(self) -> Path:
        """The evaluation windows as .npy, or texts with labels as .npz."""
        return self.folder / ("windows.npy" if isinstance(self.windows, Windows) else "windows.npz")

    @property
    def _by_token(self) -> bool:
        """Whether tokens are predicted one by one, so that all artifacts read the base's."""
        return isinstance(self.windows, Windows) or self.windows.kind in BY_TOKEN

    def _windows_for(self, path: Path) -> Path:
        """Texts with labels as the tokenizer of the artifact at `path` cuts them; windows as they are."""
        if isinstance(self.windows, Windows):
            return self.windows_file
        if path not in self._cut:
            place = whole(path)
            if self._by_token:
                words = self.words(path)
                own = self.windows if words is None else self.windows.renumbered(words)
            else:
                own = cut_by(self.windows, load_tokenizer(place), longest_text(meta_model(str(place))))
            self._cut[path] = self.windows_file
            if own is not self.windows:
                self._cut[path] = self.folder / f"windows-{len(self._cut)}.npz"
                own.save(self._cut[path])
                if own.kind == SPAN and not own.alike(self.windows):
                    self._others.add(path)
        return self._cut[path]

    def is_base(self, path: Path, runtime: str) -> bool:
        """Whether this artifact and runtime are what all others are compared with."""
        return self.base is not None and runtime == "torch" and path.resolve() == self.base.resolve()

    @property
    def scores(self) -> Scores | None:
        """Of the base, once it has been scored on all windows."""
        parts = [self._parts[start] for start in sorted(self._parts)]
        whole = sum(len(part.tokens) for part in parts) == len(self.windows)
        return Scores.joined(parts) if parts and whole else None

    def parts(self, width: int) -> list[range]:
        """The windows, cut so that logits `width` wide of a part take at most `LOGITS_BYTES`."""
        count = len(self.windows)
        step = max(1, LOGITS_BYTES // (4 * width * self.windows.length))
        return [range(start, min(start + step, count)) for start in range(0, count, step)]

    def compute(
        self, worker: WorkerProcess, part: range, advance: Callable[[], None], *, keep: bool = True
    ) -> Scores:
        """Score the base, which `worker` has loaded, on a part of the windows, and keep its logits."""
        keeping = str(self.folder) if keep else None
        self._parts[part.start] = self._score(worker, self.base, part, advance, base=None, keep=keeping)
        return self._parts[part.start]

    def compare(self, worker: WorkerProcess, path: Path, part: range, advance: Callable[[], None]) -> Scores:
        """Score what `worker` has loaded from `path`, against the base where there is one."""
        base = str(self.folder) if part.start in self._parts else None
        words, translated = self.words(path) if self._by_token else None, None
        if words is not None:
            translated = str(self.folder / "translated.npz")
            if isinstance(self.windows, Windows):
                known = words.whole(self.windows.tokens)
            else:  # what is renumbered has all its tokens there
                nothing = np.zeros((0, 0), np.int32)
                known = TranslatedWindows(nothing, nothing, words.rows)
            known.save(Path(translated))
        self._windows_for(path)
        if path in self._others:
            base = None
        return self._score(worker, path, part, advance, base=base, keep=None, translated=translated)

    def take_over(self, part: range, scores: Scores) -> None:
        """The base's scores of a part, from before a measurement was cut off."""
        self._parts[part.start] = scores

    def forget(self, part: range) -> None:
        """The base's logits of a part are not needed any more."""
        forget(self.folder, part)

    def words(self, path: Path) -> Translation | None:
        """From the windows' token ids to those of the artifact at `path`; None where it numbers alike."""
        asked = isinstance(self.windows, Examples) and self.windows.prompt is not None
        if not self._by_token and not asked:
            return None  # each artifact's tokenizer cuts the texts, and nothing is written
        if path not in self._words:
            files = [whole(folder) / "tokenizer.json" for folder in (self.base, path) if folder is not None]
            known = len(files) == 2 and all(file.is_file() for file in files)
            self._words[path] = translation(*files) if known else None
        return self._words[path]

    def _score(
        self,
        worker: WorkerProcess,
        path: Path | None,
        part: range,
        advance: Callable[[], None],
        **folders: str | None,
    ) -> Scores:
        """Score what `worker` has loaded from `path`."""
        windows = self.windows_file if path is None else self._windows_for(path)
        asked: dict[str, Any] = {"windows": str(windows), "part": (part.start, part.stop), **folders}
        texts = isinstance(self.windows, Examples) and self.windows.kind == "text"
        if not texts or path is None:
            return Scores(**worker.ask("score", advance, **asked))
        assert isinstance(self.windows, Examples)
        place = whole(path)
        tokenizer = load_tokenizer(place)
        asked["writing"] = how_to_write(place, tokenizer, self._answer_tokens)
        answer = worker.ask("score", advance, **asked)
        answer["written"] = [
            (tokenizer.backend_tokenizer.decode(ids), ended) for ids, ended in answer["written"]
        ]
        answer["wanted"] = [str(self.windows.rows[self.windows.order[index]].label) for index in part]
        return Scores(**answer)
