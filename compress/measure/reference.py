"""The base model's logits on the evaluation windows: computed once, on disk while they are needed.

`kl_to_base` wants the whole distribution of the base at every position. A fresh process reloads the base
artifact in torch, scores it and leaves one float32 .npy per window in a temporary folder; every variant's
process maps these files. Cost: 4 * V * predicted tokens bytes of disk (4 GB for 20 windows of 1024 at V =
49 k), freed at the end.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifact.folder import whole
from compress.measure.process import WorkerProcess
from compress.measure.quality import Scores
from compress.text.translation import Translation, translation
from compress.text.windows import Windows


class Reference:
    """Evaluation windows, and the base model's logits on them; a context manager that owns the files.

    `base`: the base model's artifact, or None where there is nothing to compare with. `workdir`: an
    existing folder on a disk with room; default: the system's temporary folder.
    """

    def __init__(self, base: Path | None, windows: Windows, workdir: Path | None = None) -> None:
        self.base, self.windows = base, windows
        self.scores: Scores | None = None
        self._workdir = workdir
        self._words: dict[Path, Translation | None] = {}
        self._folder: Path | None = None

    def __enter__(self) -> Reference:
        self._folder = Path(tempfile.mkdtemp(prefix="measure-", dir=self._workdir))
        np.save(self.windows_file, self.windows.tokens)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """Where this measurement keeps its files."""
        if self._folder is None:
            raise RuntimeError("use the reference in a with statement")
        return self._folder

    @property
    def windows_file(self) -> Path:
        """The evaluation windows as .npy."""
        return self.folder / "windows.npy"

    def is_base(self, path: Path, runtime: str) -> bool:
        """Whether this artifact and runtime are what all others are compared with."""
        return self.base is not None and runtime == "torch" and path.resolve() == self.base.resolve()

    def compute(self, worker: WorkerProcess, advance: Callable[[], None]) -> Scores:
        """Score the base, which `worker` has loaded, and keep its logits; once only."""
        if self.scores is None:
            self.scores = self._score(worker, advance, base=None, keep=str(self.folder))
        return self.scores

    def compare(self, worker: WorkerProcess, path: Path, advance: Callable[[], None]) -> Scores:
        """Score what `worker` has loaded from `path`, against the base where there is one."""
        base = None if self.scores is None else str(self.folder)
        words, translated = self.words(path), None
        if words is not None:
            translated = str(self.folder / "translated.npz")
            words.whole(self.windows.tokens).save(Path(translated))
        return self._score(worker, advance, base=base, keep=None, translated=translated)

    def words(self, path: Path) -> Translation | None:
        """From the windows' token ids to those of the artifact at `path`; None where it numbers alike."""
        if path not in self._words:
            files = [whole(folder) / "tokenizer.json" for folder in (self.base, path) if folder is not None]
            known = len(files) == 2 and all(file.is_file() for file in files)
            self._words[path] = translation(*files) if known else None
        return self._words[path]

    def _score(self, worker: WorkerProcess, advance: Callable[[], None], **folders: str | None) -> Scores:
        answer: dict[str, Any] = worker.ask("score", advance, windows=str(self.windows_file), **folders)
        return Scores(**answer)
