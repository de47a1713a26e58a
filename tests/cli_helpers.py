"""What the command-line tests share: text, tiny shapes, and the command inside or outside this process."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import yaml
from filelock import FileLock

from compress.cli import commands as cli

ROOT = Path(__file__).parent.parent
SHAPE = {
    "preset": "1m", "layers": 2, "hidden": 64, "heads": 2, "kv_heads": 1, "intermediate": 128,
    "vocab_size": 300, "context": 128,
}  # fmt: skip
DATA = {"window": 32, "evaluation_windows": 12, "calibration_windows": 8, "heldout_windows": 4}
_WORDS = (
    "model weight layer token window text bytes error value field recipe chain step run file folder report "
    "small large fast slow read write load save train prune round measure keep drop split join the a of to "
    "and in is for with from that this each every one two three"
).split()


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def invoke(*arguments: object) -> Outcome:
    """`compress-lm ARGUMENTS` in this process, through the console entry; what it changed is put back."""
    out, err = io.StringIO(), io.StringIO()
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    code = 0
    try:
        with (
            mock.patch.object(sys, "argv", ["compress-lm", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGINT, handler)
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """The one line with which the command refuses."""
    outcome = invoke(*arguments)
    lines = [line for line in outcome.err.splitlines() if not _is_news(line)]
    assert outcome.code == 2, outcome
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: "), outcome.err
    return lines[0]


def _is_news(line: str) -> bool:
    """Whether a line on standard error tells of a step that is done."""
    return line.endswith((" s", "done before"))


def python(*arguments: object, path: Path | None = None, timeout: float = 120) -> Any:
    """This Python with `arguments`; `path` comes first in its PYTHONPATH."""
    places = [path, ROOT, os.environ.get("PYTHONPATH")]
    fixed = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(str(place) for place in places if place),
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **fixed}, timeout=timeout,
    )  # fmt: skip


def write_text(folder: Path, documents: int = 80, words: int = 400, seed: int = 0) -> Path:
    """A folder of documents of made-up sentences in which some words follow others more often."""
    source = random.Random(seed)
    likely = {word: source.sample(_WORDS, 4) for word in _WORDS}
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        word, sentence, lines = source.choice(_WORDS), [], []
        for _ in range(words):
            word = source.choice(likely[word] if source.random() < 0.9 else _WORDS)
            sentence.append(word)
            if source.random() < 0.1:
                lines.append(" ".join(sentence).capitalize() + ".")
                sentence = []
        (folder / f"{number:03}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_recipe(path: Path, text: Path, **changes: Any) -> Path:
    """A recipe that measures little: an untrained base and no variants, with `changes`."""
    recipe = {
        "name": "tiny",
        "threads": 1,
        "model": {"create": SHAPE},
        "data": {"text": str(text), **DATA},
        "measure": {"prefill_tokens": 16, "rounds": 1},
        "report": {"prompt": "The model", "sample_tokens": 4},
    }
    path.write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False), encoding="utf-8")
    return path


def settings(*values: str) -> list[str]:
    """`--set` before each of them."""
    return [part for value in values for part in ("--set", value)]


def results(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What a run measured, by variant and runtime."""
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return {(line["variant"], line["runtime"]): line for line in lines}


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder, and its length."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that `build` fills once for all processes of a parallel test run."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    common = factory.getbasetemp().parent if parallel else factory.getbasetemp()
    folder, done = common / name, common / f"{name}.done"
    with FileLock(common / f"{name}.lock"):
        if not done.exists():
            folder.mkdir()
            build(folder)
            done.touch()
    return folder
