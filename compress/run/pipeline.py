"""The fold over passes: from a recipe to artifacts on disk.

Every step reads its parent from disk and is saved when done, so that a run killed at any moment goes on
with the step it was in and ends with the same bytes. Shared prefixes run once. The pipeline, not the
pass, records name, fields, seconds, peak memory, parent, fingerprint and seed.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compress.artifact.applied import coverage_of, step_record
from compress.artifact.bundle import Bundle
from compress.artifact.counts import weight_file_bytes
from compress.artifact.folder import MANIFEST
from compress.artifact.labels import fitted
from compress.context import lend
from compress.errors import UserError, staying
from compress.host.memory import give_back, reset_peak
from compress.host.processes import is_main, on_this_machine, part, wait
from compress.models.checkpoints import load_config, load_tokenizer, meta_model
from compress.models.create import create
from compress.models.heads import numbering
from compress.models.running import native_precision
from compress.passes.base import Need, Pass
from compress.records.manifest import Lineage, Manifest, PassRecord
from compress.records.run import DataRecord, VariantRecord
from compress.run.identity import FileHashes, identity, identity_of_adapter
from compress.run.lending import parent_of
from compress.run.recipe import Recipe
from compress.run.store import StepStore, code_of, earlier_seconds, fingerprint, pass_version
from compress.runtimes.null_pass import null_pass
from compress.structured.vocabulary import fewer_rows, trimmed_tokenizer
from compress.tasks.base import longest_text, rows_of
from compress.tasks.registry import task_of
from compress.text.documents import Document, load_documents, text_hash
from compress.text.encode import asked_by
from compress.text.examples import Examples
from compress.text.labelled.as_text import documents_of, text_of
from compress.text.labelled.base import Labelled
from compress.text.labelled.encoded import LabelledData, encoded
from compress.text.labelled.load import load_labelled
from compress.text.translation import Translation, translation
from compress.text.windows import (
    LABELLED,
    TextData,
    Windows,
    prepare,
    renumbered,
    training_documents,
)

EVALUATION_FILE = "evaluation.npy"
HASHES = ".hashes.json"  # of the files of checkpoints, so that a second run need not read them all
LOGS = "logs"  # what trackers write; a variant cannot have this name
_LARGE = 50_000_000  # bytes of a model whose memory is worth the half second that collecting takes


@dataclass(frozen=True)
class Made:
    """What the making wing leaves to the telling wing."""

    folder: Path
    variants: list[VariantRecord]
    data: TextData
    data_record: DataRecord
    evaluation: Windows | Examples  # what quality is measured on: texts with labels where the base has a head
    steps: dict[str, Path]  # fingerprint -> folder of every finished step
    judging: LabelledData | None = None  # the labelled texts, where they say how good the base is


def make(recipe: Recipe, folder: Path, say: Callable[[str], None] = lambda line: None) -> Made:
    """Run all passes of `recipe` into `folder`; `say` gets a line per step.

    Raises:
        UserError: whatever a pass, the text or the disk refuses; finished steps are kept.
    """
    maker = _Maker(recipe, folder, say)
    # cut first, so that text which cannot serve is refused before any pass runs
    maker.data.evaluation.save(folder / EVALUATION_FILE)
    variants = [maker.variant(name) for name in recipe.ordered()]
    maker.store.forget_others(maker.used)
    steps = {found: maker.store.path(found) for found in maker.used}
    part()
    judged = maker.evaluation()
    return Made(folder, variants, maker.data, maker.data_record(judged), judged, steps, maker.judging)


def join(recipe: Recipe, folder: Path) -> None:
    """What a process other than the main one does for `recipe`: its part of the training steps.

    Raises:
        UserError: as `make`.
    """
    maker = _Maker(recipe, folder, lambda line: None)
    for name in recipe.ordered():
        maker.chain(name)
    part()


def needs(recipe: Recipe, what: Need) -> bool:
    """Whether any pass of the recipe needs this part of the text."""
    chains = [recipe.base, *recipe.variants.values()]
    return any(what in step.requires() for chain in chains for step in chain.passes)


class _Maker:
    """One run of a recipe: the text, the store, and the fingerprints so far."""

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.folder, self.say = recipe, folder, say
        self.store = StepStore(folder)
        self.hashes = FileHashes(folder / HASHES, keeps=is_main())
        self.used: set[str] = set()
        self.ends: dict[str, str] = {}  # variant -> fingerprint of its last step
        self.precision = native_precision()
        place = on_this_machine()[0]
        self.device = torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")

    @cached_property
    def labelled(self) -> Labelled | None:
        """The recipe's labelled rows."""
        config = self.recipe.data.labelled
        if config is None:
            return None
        given = load_labelled(config, self.recipe.seed)
        if self.recipe.model.create is not None:
            return given
        return fitted(given, load_config(self.store.path(self.source)))

    @cached_property
    def documents(self) -> list[Document]:
        """The recipe's text."""
        if self.labelled is not None and self.recipe.data.text == LABELLED:
            return documents_of(self.labelled)
        return load_documents(self.recipe.data.text)

    @cached_property
    def source(self) -> str:
        """Fingerprint of the model before any pass; makes and saves it if need be."""
        architecture = self.recipe.model.create
        if architecture is not None:
            documents = training_documents(self.documents)
            text = hashlib.sha256("\0".join(d.text for d in documents).encode()).hexdigest()
            config = architecture.model_dump()
            found = fingerprint("create", config, text, self.recipe.seed, code_of("compress.models.create"))
            label = f"created here: {architecture.label}"

            def new() -> Bundle:
                return Bundle(*create(architecture, documents, self.recipe.seed), Lineage(source=label))

            return self._begin(found, "create", label, config, new)
        checkpoint, adapter = str(self.recipe.model.checkpoint), self.recipe.model.adapter
        more: list[Any] = []
        if adapter is not None:
            more = [identity_of_adapter(adapter, self.hashes), code_of("compress.models.adapters")]
        found = fingerprint("checkpoint", identity(checkpoint, self.hashes), *more, code_of())
        label = checkpoint if adapter is None else f"{checkpoint} with {adapter} merged"
        named = {"checkpoint": checkpoint} | ({} if adapter is None else {"adapter": adapter})
        return self._begin(
            found, "checkpoint", label, named, lambda: Bundle.load(checkpoint, adapter=adapter)
        )

    @cached_property
    def data(self) -> TextData:
        """The text cut into disjoint windows with the source's tokenizer, and labelled texts, too."""
        source = self.store.path(self.source)
        tokenizer, config = load_tokenizer(source), load_config(source)
        labelled = None
        if self.labelled is not None:
            names = numbering(config, self.labelled.kind, self.labelled.names)
            longest, rows = longest_text(meta_model(str(source))), rows_of(config)
            embeds = task_of(config).embeds
            labelled = encoded(self.labelled, names, tokenizer, longest, rows, embeds=embeds)
            if self.recipe.data.text == LABELLED:
                return text_of(self.recipe.data, labelled, tokenizer)
        training = needs(self.recipe, "train")
        text = prepare(
            self.recipe.data, self.documents, tokenizer, training=training,
            calibrating=needs(self.recipe, "calibration"),
            tokenizer_from_text=self.recipe.model.create is not None,
            rows=rows_of(config),
        )  # fmt: skip
        return replace(text, labelled=labelled)

    def evaluation(self) -> Windows | Examples:
        """Texts with labels where the base has a head for them, or is asked for them; else windows."""
        if self.judging is not None:
            return self.judging.evaluation
        base = self.store.path(self.ends["base"])
        labelled, config = self.data.labelled, self.recipe.data.labelled
        prompt = None if config is None else config.prompt
        if labelled is not None and prompt is not None and task_of(load_config(base)).continues:
            longest = longest_text(meta_model(str(base)))
            return asked_by(labelled.evaluation, prompt, load_tokenizer(base), longest)
        return self.data.evaluation

    @cached_property
    def judging(self) -> LabelledData | None:
        """The labelled texts as the base reads them, where they say how good it is."""
        source, labelled = self.store.path(self.source), self.data.labelled
        task = task_of(load_config(self.store.path(self.ends["base"])))
        if labelled is None or not task.judged_by(labelled.kind):
            return None
        longest = longest_text(meta_model(str(source)))
        return labelled.apart(load_tokenizer(source), longest, wanted=task.embeds)

    def variant(self, name: str) -> VariantRecord:
        """Run a variant's chain and show its end as a folder; its parents have run before."""
        parent, steps = self.chain(name)
        current = self.ends[name]
        artifact = self.store.publish(current, name)
        exports = Manifest.read(artifact / MANIFEST).exports
        return VariantRecord(
            name=name, parent=parent, artifact=name, exports=exports, fingerprint=current, steps=steps
        )

    def chain(self, name: str) -> tuple[str | None, list[PassRecord]]:
        """Run the passes of a variant: its parent and its steps."""
        chain = self.recipe.chain(name)
        parent = None if name == "base" else (chain.parent or "base")
        current = self.source if parent is None else self._without_exports(parent)
        steps = [self.store.record(current)] if parent is None else []
        for number, step in enumerate(chain.passes, start=1):
            label = f"{name} {number}/{len(chain.passes)} {step.name()}"
            with staying(label):
                current = self._step(step, current, label)
            steps.append(self.store.record(current))
        self.ends[name] = current
        return parent, steps

    def data_record(self, judged: Windows | Examples) -> DataRecord:
        """Counts and hashes for the report; `judged`: as `evaluation` gives it."""
        data = self.data
        labelled = None if data.labelled is None else dict(data.labelled.notes)
        if labelled is not None and isinstance(judged, Examples) and judged.prompt is not None:
            labelled |= {"prompt": judged.prompt.template, "prompts_cut_off": judged.cut}
        return DataRecord(
            source=data.source,
            window=data.window,
            train_tokens=len(data.train),
            train_sha256=data.train_sha256,
            calibration_tokens=int(data.calibration.tokens.size),
            calibration_sha256=data.calibration.sha256,
            evaluation_tokens=judged.size,
            evaluation_sha256=judged.sha256,
            evaluation_bytes=judged.bytes,
            labelled=labelled,
        )

    def _step(self, step: Pass, parent: str, label: str) -> str:
        """One pass; nothing is done when its result is already there."""
        words = self._words(parent)
        found = fingerprint(
            parent, step.name(), step.deciding_fields(), self._data_hash(step), self.recipe.seed,
            self.precision if step.requires() else "",
            pass_version(step, *(f.__module__ for f in (renumbered, fewer_rows) if words is not None)),
            *[identity(source, self.hashes) for source in step.reads()], *map(text_hash, step.texts()),
        )  # fmt: skip
        self.used.add(found)
        if self.store.has(found):
            self.say(f"{label}: done before")
            return found
        self._tell_damage(found, label)
        if not (step.together or is_main()):
            wait(lambda: self.store.has(found))
            return found
        if weight_file_bytes(self.store.path(parent)) > _LARGE:
            give_back()  # the step before is over, and its models wait for the garbage collector
        bundle, context = lend(
            step.kind, parent_of(step, self.store.path(parent), self.device),
            self.data if words is None else self._renumbered(words, parent),
            lambda: self._teacher(words), seed=self.recipe.seed, workdir=self.store.workdir(found),
            device=self.device, precision="bfloat16" if self.precision == "bfloat16" else "float32",
            logs=self.folder / LOGS / label.replace("/", "-of-").replace(" ", "-"),
        )  # fmt: skip
        reset_peak()
        earlier = earlier_seconds(context.workdir) if is_main() else 0.0
        coverage = coverage_of(step, bundle.model)
        started = time.perf_counter()
        result = step(bundle, context)
        seconds = earlier + time.perf_counter() - started
        if not is_main():
            wait(lambda: self.store.has(found))
            return found
        record = step_record(
            step,
            bundle,
            result,
            seconds=seconds,
            seed=self.recipe.seed,
            parent=parent,
            fingerprint=found,
            coverage=coverage,
        )
        lineage = Lineage(source=bundle.lineage.source, steps=(*bundle.lineage.steps, record))
        result = result.evolve(lineage=lineage)
        self.store.save(result, self.store.path(parent) if step.kind == "export" else None)
        self.say(f"{label}: {seconds:.1f} s")
        return found

    def _tell_damage(self, found: str, label: str) -> None:
        if (wrong := self.store.damage(found)) is not None:
            self.say(f"{label}: done again, since a file is not what was written: {wrong.partition(';')[0]}")

    def _renumbered(self, words: Translation, parent: str) -> TextData:
        """The text in the smaller vocabulary of a finished step; labelled texts by its tokenizer."""
        text = renumbered(self.data, words)
        if self.data.labelled is None:
            return text
        place = self.store.path(parent)
        longest = longest_text(meta_model(str(place)))
        return replace(text, labelled=self.data.labelled.cut_by(load_tokenizer(place), longest))

    def _words(self, step: str) -> Translation | None:
        """From the source's token ids to those of a finished step; None where it numbers alike."""
        files = [self.store.path(found) / "tokenizer.json" for found in (self.source, step)]
        return translation(*files) if all(file.is_file() for file in files) else None

    def _teacher(self, words: Translation | None) -> Bundle:
        """The base; for a model of fewer tokens, with the rows of those."""
        bundle = Bundle.load(self.store.path(self.ends["base"]))
        if words is None:
            return bundle
        kept = words.rows.tolist()
        return bundle.evolve(
            model=fewer_rows(bundle.model, kept), tokenizer=trimmed_tokenizer(bundle.tokenizer, kept)
        )

    def _begin(
        self, found: str, name: str, source: str, config: dict[str, Any], load: Callable[[], Bundle]
    ) -> str:
        """Save the model that all chains start from, once."""
        self.used.add(found)
        unchecked = self.store.working / f"{found[:16]}.unchecked"
        if not is_main():  # it is there before the main process has compared it, and may be made again
            wait(lambda: not unchecked.exists() and self.store.has(found))
            return found
        if unchecked.exists() or not self.store.has(found):
            self._tell_damage(found, name)
            started = time.perf_counter()
            bundle = load()
            record = PassRecord(
                name=name, kind="source", config=config, seconds=time.perf_counter() - started,
                peak_rss_bytes=None, parent=None, fingerprint=found, seed=self.recipe.seed, notes={},
            )  # fmt: skip
            lineage = Lineage(source=source, steps=(record,))
            self.store.working.mkdir(parents=True, exist_ok=True)
            unchecked.touch()  # a kill before the comparison has ended: it is made again
            self.store.save(bundle.evolve(lineage=lineage, exports={}))  # its masks go on holding
            del bundle
            self._null_pass(found, name, source)
            unchecked.unlink()
            self.say(f"{name} {source}: {record.seconds:.1f} s")
        return found

    def _null_pass(self, found: str, name: str, source: str) -> None:
        """Compare what all chains start from with the model that it was made of, before any work."""
        place = self.store.path(found)
        try:
            stock = name == "checkpoint" and self.recipe.model.adapter is None
            reason = null_pass(source if stock else place, place)
        except UserError:
            shutil.rmtree(place, ignore_errors=True)  # the next run must not take it for finished
            raise
        if reason is not None:
            self.say(f"{name}: not compared with the stock loader's model: {reason}")

    def _without_exports(self, name: str) -> str:
        """The last step of a variant that changed weights: children do not depend on exports."""
        current = self.ends[name]
        while (record := self.store.record(current)).is_export and record.parent:
            current = record.parent
        return current

    def _data_hash(self, step: Pass) -> dict[str, str | int]:
        """Hashes of the parts of the data that the pass says it needs, and the length of their windows."""
        parts = {
            "train": lambda: self.data.train_sha256,
            "calibration": lambda: self.data.calibration.sha256,
            "heldout": lambda: self.data.heldout.sha256,
            "teacher": lambda: self._without_exports("base"),
            "labelled": lambda: "" if self.data.labelled is None else self.data.labelled.sha256,
        }
        needs: set[Need] = {*step.requires()}
        if step.uses_labels and self.data.labelled is not None:
            needs.add("labelled")
        hashes: dict[str, str | int] = {need: parts[need]() for need in sorted(needs)}
        return hashes | {"window": self.data.window} if hashes else hashes
