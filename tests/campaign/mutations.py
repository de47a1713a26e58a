"""Damaged inputs: each ends in right data, or in one line that says what is wrong.

A case copies a whole input, damages one of its files by one operator drawn from the seed, and opens it in a
child as the commands do. It is `right` where what comes out is what the undamaged input gives (all that
states hashes or checksums), or what the damaged file says by the definition of its format (all else: in a
float of somebody else's nothing tells one finite value from another, nor one theta of rotary positions); see
`openers.py`. It is `refused` by the one line of a `UserError`. Anything else is bad: `traceback`, `killed` by
a signal, `hang` (20 s), `memory` (1.5 GB), `damaged and loaded`, `touched` (something outside the case's
folder was written, or the network was asked). What libraries print beside a refusal is not judged.

Cases run one after the other in each of `--jobs` processes, each in a fork of a process that has imported
everything.

    python -m tests.campaign.mutations SEED NUMBER   shows one case again and keeps its folder
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from . import inputs, openers
from .core import Outcome, Settings
from .forked import Ended, forked
from .operators import GGUF, JSON, LINES, RAW, TENSORS, TEXT, WORDS, YAML, Operator

Open = Callable[[Path], dict[str, Any]]
_WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Target:
    """One input and one way to open it.

    Attributes:
        source: its folder among the `inputs`.
        open: given the copy of that folder, or of `inside` in it.
        damaged: patterns of files, and the operators for each.
    """

    source: str
    open: Open
    damaged: dict[str, tuple[Operator, ...]]
    inside: str = ""


_SETTINGS = {"*.json": JSON}
_ARTIFACT = {"*.json": JSON, _WEIGHTS: TENSORS}
TARGETS: dict[str, Target] = {
    "HF: config": Target("hf", openers.foreign, {"config.json": JSON}),
    "HF: config, dry run": Target("hf", openers.planned, _SETTINGS),
    "HF: config, bench": Target("hf", openers.benched, _ARTIFACT),
    "HF: weights": Target("hf", openers.foreign, {_WEIGHTS: TENSORS}),
    "HF: weights, streamed": Target("hf", openers.foreign_streamed, {_WEIGHTS: TENSORS, "config.json": JSON}),
    "HF: bfloat16": Target("half", openers.foreign, {_WEIGHTS: TENSORS, "config.json": JSON}),
    "HF: tokenizer": Target("hf", openers.foreign_tokenizer, {"tokenizer.json": JSON}),
    "HF: tokenizer's settings": Target("hf", openers.foreign_tokenizer, {"tokenizer_config.json": JSON}),
    "HF: generation": Target("hf", openers.foreign_tokenizer, {"generation_config.json": JSON}),
    "HF: GPT-2": Target("gpt2", openers.foreign, _ARTIFACT),
    "HF: encoder": Target("encoder", openers.foreign, _ARTIFACT),
    "HF: encoder-decoder": Target("seq2seq", openers.foreign, _ARTIFACT),
    "chat template": Target("hf", openers.chat, {"chat_template.jinja": TEXT, "tokenizer_config.json": JSON}),
    "sharded: index": Target("sharded", openers.foreign, {"*.index.json": JSON}),
    "sharded: parts": Target("sharded", openers.foreign, {_WEIGHTS: TENSORS}),
    "sharded: streamed": Target(
        "sharded", openers.foreign_streamed, {_WEIGHTS: TENSORS, "*.index.json": JSON}
    ),
    **{
        f"GGUF: {kind}": Target(f"gguf {kind}", openers.gguf, {"model.gguf": GGUF})
        for kind in ("F16", "Q8_0", "Q4_0", "Q4_1")
    },
    "GGUF with hashes": Target("gguf with hashes", openers.gguf_hashed, {"model.gguf": GGUF}),
    "hashes: SHA256SUMS": Target("gguf with hashes", openers.gguf_hashed, {"SHA256SUMS": TEXT}),
    **{
        f"artifact: {kind}": Target(kind, openers.artifact, _ARTIFACT)
        for kind in ("float", "int8", "int4", "coded", "masked", "sparse", "codes masked")
    },
    "artifact: manifest": Target("int4", openers.artifact, {"manifest.json": JSON}),
    "artifact: manifest, masks": Target("codes masked", openers.artifact, {"manifest.json": JSON}),
    "artifact: streamed": Target("float", openers.artifact_streamed, _ARTIFACT),
    **{
        f"artifact without hashes: {kind}": Target(kind, openers.artifact_unverified, _ARTIFACT)
        for kind in ("int8", "coded", "sparse", "codes masked")
    },
    "ONNX": Target("onnx", openers.onnx, {"*.json": JSON, "*.onnx": RAW, "*.data": RAW}),
    "ONNX: encoder": Target("onnx encoder", openers.onnx, {"*.json": JSON, "*.onnx": RAW, "*.data": RAW}),
    "ONNX without hashes": Target(
        "onnx without hashes", openers.onnx_unverified, {"*.onnx": RAW, "*.data": RAW}
    ),
    "ONNX without hashes: encoder": Target(
        "onnx encoder without hashes", openers.onnx_unverified, {"*": RAW, "*.json": JSON}
    ),
    "compressed-tensors": Target("compressed-tensors", openers.compressed, {**_ARTIFACT, "SHA256SUMS": TEXT}),
    "records: results": Target("run", openers.results, {"results.jsonl": LINES}),
    "records: run": Target("run", openers.run, {"run.json": JSON}),
    "records: report": Target("run", openers.run, {"results.jsonl": LINES, "recipe.yaml": YAML}),
    "records: steps": Target("run", openers.step, {".steps/*/manifest.json": JSON, ".steps/*/*": RAW}),
    "records: unfinished": Target("unfinished", openers.unfinished, {"*.json": JSON, "started": TEXT}),
    "records: training": Target("unfinished", openers.training, {_WEIGHTS: TENSORS}),
    "recipe": Target("recipe", openers.recipe, {"recipe.yaml": YAML}),
    "--set": Target("recipe", openers.overrides, {"set.txt": WORDS}),
    "text: plain": Target("texts", openers.documents, {"text.txt": TEXT}, "text.txt"),
    "text: labelled": Target("texts", openers.documents, {"rows.jsonl": LINES}, "rows.jsonl"),
    "text: chats": Target("texts", openers.documents, {"chat.jsonl": LINES}, "chat.jsonl"),
    "text: parquet": Target("texts", openers.documents, {"rows.parquet": RAW}, "rows.parquet"),
    "labelled: table": Target("texts", openers.labelled, {"classes.csv": TEXT}, "classes.csv"),
    "labelled: lines": Target("texts", openers.labelled, {"rows.jsonl": LINES}, "rows.jsonl"),
    "labelled: words": Target("texts", openers.labelled, {"words.conll": TEXT}, "words.conll"),
    "labelled: parquet": Target("texts", openers.labelled, {"classes.parquet": RAW}, "classes.parquet"),
    "vocabularies": Target(
        "vocabularies", openers.vocabularies, {"smaller/*.json": JSON, "larger/*.json": JSON}
    ),
}  # fmt: skip


class Campaign:
    """Whole inputs in a folder, and what each gives."""

    def __init__(self, work: Path) -> None:
        self.work, self.whole = work, work.parent / "inputs"  # of all parts of a campaign
        if not self.whole.exists():
            self.whole.mkdir()
            made = forked(_made, self.whole, work / "scratch", seconds=600, memory=1 << 40)
            if made.how != "value":
                raise RuntimeError(f"the inputs cannot be made: {made.line}\n{made.printed}")
        for folder, _, names in os.walk(self.whole):
            for name in names:
                os.utime(Path(folder) / name, (1_700_000_000, 1_700_000_000))
        self.targets = {
            name: target
            for name, target in TARGETS.items()
            if any((self.whole / target.source).glob(pattern) for pattern in target.damaged)
            and (self.whole / target.source / target.inside).exists()
        }
        self._facts: dict[str, dict[str, Any]] = {}

    def facts(self, name: str) -> dict[str, Any]:
        """What the undamaged input gives."""
        if name not in self._facts:
            target = self.targets[name]
            folder = self.copy(target.source) / target.inside
            ended = forked(_with_modules(target.open), folder, self.work / "scratch", seconds=120)
            if ended.how != "value" or ended.events:
                raise RuntimeError(f"{name}: the whole input ends so: {ended}")
            self._facts[name] = ended.value["value"]
            _import(ended.value["modules"])
        return self._facts[name]

    def case(self, seed: int, number: int) -> tuple[str, str, Ended]:
        """The target, what was done to it, and how it ended."""
        chance = Random(f"{seed}/{number}")
        name = list(self.targets)[number % len(self.targets)]
        target = self.targets[name]
        self.facts(name)
        folder = self.copy(target.source)
        done = None
        while done is None:
            pattern = chance.choice(sorted(target.damaged))
            files = sorted(p for p in folder.glob(pattern) if p.is_file())
            if not files:
                continue
            file, operator = chance.choice(files), chance.choice(target.damaged[pattern])
            done = operator(file, chance)
        said = f"{file.relative_to(folder)}: {operator.__name__}: {done}"
        return name, said, forked(target.open, folder / target.inside, self.work / "scratch")

    def beside(self, name: str) -> Campaign:
        """The same inputs and what they give, with a working folder of its own inside this one's."""
        other = copy(self)
        other.work = self.work / name
        other.work.mkdir(exist_ok=True)
        return other

    def copy(self, source: str) -> Path:
        """A folder like a whole input, in place of the last one."""
        case = self.work / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.whole / source, case / "input")
        return case / "input"

    def verdict(self, name: str, ended: Ended) -> tuple[str, str]:
        """A word for how a case ended, and the line that says why."""
        if ended.events:
            return "touched", ended.events[0]
        if ended.how == "refused":
            if "\n" in ended.line or not ended.line.isprintable():
                return "traceback", f"more than a line: {ended.line!r}"
            return "refused", ended.line
        if ended.how == "wrong":
            return "damaged and loaded", ended.line
        if ended.how != "value":
            return ended.how, ended.line
        facts = self.facts(name)
        if name == "records: steps":  # those that are not whole are done again
            facts = {key: value for key, value in facts.items() if key in ended.value}
        if not (self.work / "case" / "input" / "manifest.json").exists():  # a plain checkpoint has no masks
            facts = {key: value for key, value in facts.items() if key != "masks"}
        other = [key for key, value in facts.items() if ended.value.get(key) != value]
        if other and not _begun_again(name, ended.value):
            return "damaged and loaded", f"other {', '.join(other)} than those of the whole input"
        return "right", ""


def _begun_again(name: str, found: dict[str, Any]) -> bool:
    """Whether the state of a training was left aside."""
    return name == "records: training" and found["state"] is None


def run(settings: Settings) -> Iterator[Outcome]:
    """Outcomes of `settings.count` cases, in turn over the targets."""
    campaign = Campaign(settings.work)
    for name in list(campaign.targets)[: settings.count]:
        campaign.facts(name)  # here, so that no process works them out again
    numbers = range(settings.count)
    if settings.jobs == 1:
        yield from map(partial(_outcome, campaign, settings.seed), numbers)
        return
    with get_context("fork").Pool(settings.jobs) as pool:
        yield from pool.imap(partial(_outcome, campaign, settings.seed), numbers, chunksize=20)


def _outcome(campaign: Campaign, seed: int, number: int) -> Outcome:
    """That of one case, in a folder of this process."""
    campaign = campaign.beside(str(os.getpid()))
    name, done, ended = campaign.case(seed, number)
    verdict, line = campaign.verdict(name, ended)
    return Outcome(name, verdict, line, f"python -m tests.campaign.mutations {seed} {number}   # {done}")


def _made(folder: Path) -> dict[str, Any]:
    inputs.make(folder)
    return {}


def _with_modules(call: Open) -> Open:
    """The call, and the names of modules that it has imported."""

    def both(folder: Path) -> dict[str, Any]:
        before = set(sys.modules)
        value = call(folder)
        return {"value": value, "modules": sorted(set(sys.modules) - before)}

    return both


def _import(names: list[str]) -> None:
    """So that no child has to; where threads run, a fork would leave their locks to nobody."""
    for name in names:
        if name.startswith(
            ("compress.", "transformers.", "torch.", "onnx", "gguf", "pyarrow", "compressed_")
        ):
            with contextlib.suppress(Exception):
                import_module(name)
    gc.collect()
    gc.freeze()  # pages of the parent's objects stay shared


def main() -> None:
    """One case, shown and kept."""
    seed, number = map(int, sys.argv[1:3])
    work = Path(tempfile.mkdtemp(prefix="campaign-")) / "one"
    work.mkdir()
    campaign = Campaign(work)
    name, done, ended = campaign.case(seed, number)
    verdict, line = campaign.verdict(name, ended)
    print(f"{name}\n{done}\n{verdict}: {line}\n{json.dumps(ended.value)}\n{ended.printed}\n{work / 'case'}")


if __name__ == "__main__":
    main()
