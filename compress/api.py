"""What the command line and notebooks call: run a recipe, measure artifacts, compare runs.

Joins the two wings: what `pipeline` made is what `measure` reloads from disk, and `report` draws.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from compress import report
from compress.bundle import Bundle
from compress.checkpoints import load_tokenizer, meta_model, read_json
from compress.data import DataConfig, TextData, Windows, prepare
from compress.errors import UserError
from compress.machine import machine, usable_cores, versions
from compress.measure import harness
from compress.measure.ngrams import reference_rows
from compress.memory import disk_bytes
from compress.pipeline import Made, join, make
from compress.preflight import preflight
from compress.processes import on_this_machine
from compress.protocol import MeasureProtocol
from compress.recipe import Recipe
from compress.records import (
    PassRecord,
    Reference,
    Result,
    RunRecord,
    Sample,
    SampleBook,
    StepResult,
    VariantRecord,
    read_results,
    write_results,
    write_whole,
)
from compress.runtimes import detect_runtime
from compress.runtimes.providers import require_provider
from compress.steps import STEPS, StepStore, alone
from compress.tasks import longest_text
from compress.text import load_documents
from compress.vocabulary import translation

Say = Callable[[str], None]
_T = TypeVar("_T")


def run(recipe: Recipe, folder: Path, say: Say = print) -> RunRecord:
    """Run a recipe: preflight, passes, measurement, report. Call again to resume.

    Leaves `recipe.yaml`, a folder per variant, `results.jsonl`, `run.json`, `report.html` and `report.md`.

    In a process that `torchrun` or `accelerate launch` started this is for the main one; `take_part` is for
    the others.

    Raises:
        UserError: whatever the preflight, a pass, or the disk refuses.
    """
    made = make_artifacts(recipe, folder, say)
    with alone(folder):
        record = tell(recipe, made)
        write_report(folder)
    return record


def make_artifacts(recipe: Recipe, folder: Path, say: Say = print) -> Made:
    """The first half of `run`: everything but measuring and reporting, which a later `run` catches up on.

    Raises:
        UserError: whatever the preflight, a pass, or the disk refuses.
    """
    pin_threads(recipe.threads)
    preflight(recipe, folder)
    try:
        (folder / STEPS).mkdir(parents=True, exist_ok=True)  # what tells a run's folder from others
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output") from None
    with alone(folder):
        write_whole(folder / "recipe.yaml", recipe.to_yaml())
        return make(recipe, folder, say)


def take_part(recipe: Recipe, folder: Path) -> None:
    """What the processes beside the main one do: their share of the training, and nothing else.

    Raises:
        UserError: whatever a pass refuses.
    """
    pin_threads(recipe.threads)
    join(recipe, folder)


def pin_threads(threads: int | None) -> int:
    """Use this many CPU threads for the passes; default: all cores, shared by the processes that run."""
    import torch

    count = threads or max(1, usable_cores() // on_this_machine()[1])
    torch.set_num_threads(count)
    return count


def tell(recipe: Recipe, made: Made) -> RunRecord:
    """Measure everything that was made; results of an earlier, interrupted call are taken over."""
    folder, windows = made.folder, made.data.evaluation
    protocol = (
        recipe.measure
        if recipe.measure.threads
        else recipe.measure.model_copy(update={"threads": recipe.threads})
    )
    path = folder / "results.jsonl"
    base = folder / "base"
    targets = [t for variant in made.variants for t in _targets(folder, variant)]
    tokenizer = load_tokenizer(base)
    prompt = tokenizer(recipe.report.prompt, add_special_tokens=False)["input_ids"]
    earlier = _readable(RunRecord.read, folder / "run.json")
    work = StepStore(folder).working  # what a kill leaves here, the next call sweeps up
    work.mkdir(exist_ok=True)
    book = work / "samples.json"
    kept = [s for record in (earlier, _readable(SampleBook.read, book)) if record for s in record.samples]
    samples = {(s.variant, s.runtime): s for s in kept if s.prompt == recipe.report.prompt}
    done = [r for r in _readable(read_results, path) or [] if (r.variant, r.runtime) in samples]
    write_results(path, done)

    def keep_sample(target: harness.Target, tokens: list[int]) -> None:
        key = (target.variant, target.runtime)
        samples[key] = Sample(
            variant=key[0], runtime=key[1], prompt=recipe.report.prompt, text=tokenizer.decode(tokens)
        )
        SampleBook(samples=list(samples.values())).write(book)

    inner, ends = _inner_steps(made.variants)
    known = earlier is not None and earlier.variants == made.variants
    known = known and len(harness.taken_over(targets, windows, protocol, done)) == len(targets)
    unfinished = work / "measured.json"
    found = harness.measure(
        targets, base, windows, protocol, steps=[] if known else _step_targets(made, inner, ends), done=done,
        workdir=work, unfinished=unfinished, calibration=made.data.calibration,
        continuation=harness.Continuation(prompt, recipe.report.sample_tokens), on_sample=keep_sample,
        on_result=lambda result: harness.save_result(path, result),
    )  # fmt: skip
    results = found[: len(targets)]
    steps = earlier.step_results if earlier and known else _step_results(made, inner, ends, found)
    write_results(path, results)
    record = RunRecord(
        recipe_name=recipe.name,
        base="base",
        variants=made.variants,
        data=made.data_record,
        machine=machine(),
        versions=versions(),
        references=_references(made.data, base),
        samples=[samples[t.variant, t.runtime] for t in targets if (t.variant, t.runtime) in samples],
        step_results=steps,
    )
    record.write(folder / "run.json")
    book.unlink(missing_ok=True)
    unfinished.unlink(missing_ok=True)
    return record


def write_report(folder: Path) -> Path:
    """Draw `report.html` and `report.md` of a run from its records."""
    record, results, recipe = load_run(folder)
    html, markdown = report.render(record, results, recipe)
    write_whole(folder / "report.html", html)
    write_whole(folder / "report.md", markdown)
    return folder / "report.html"


def load_run(folder: Path) -> tuple[RunRecord, list[Result], str]:
    """The records of a finished run, and its recipe."""
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"{folder}: no recipe.yaml, so this is no run")
    results = read_results(folder / "results.jsonl")
    return RunRecord.read(folder / "run.json"), results, recipe.read_text(encoding="utf-8")


def compare(folders: Sequence[Path], output: Path) -> Path:
    """One page over several runs."""
    write_whole(output, report.compare([load_run(folder) for folder in folders]))
    return output


def bench(
    artifacts: Sequence[Path],
    data: DataConfig,
    base: Path | None = None,
    protocol: MeasureProtocol | None = None,
) -> list[Result]:
    """Measure existing artifacts or plain model directories on a text, against `base` where given.

    The windows are cut with the tokenizer of `base`, or of the first artifact; the others must have the
    same vocabulary, or with a `base` fewer of its tokens, since perplexities over different tokens cannot
    be compared.

    Raises:
        UserError: an artifact that cannot be loaded, text that is too short, another vocabulary, an execution
            provider that is absent, windows beyond an artifact's context.
    """
    require_provider((protocol or MeasureProtocol()).provider)
    first = base or artifacts[0]
    windows = evaluation_windows(first, data)
    own = _vocabulary(first)
    for path in artifacts:
        if _vocabulary(path) != own and not _trimmed(path, base):
            raise UserError(f"{path}: has another vocabulary than {first}; measure it on its own")
    for path in artifacts:
        if not (path / "config.json").is_file():
            continue
        if data.window > (longest := longest_text(meta_model(str(path)))):
            raise UserError(f"window: {data.window} tokens, but {path} takes at most {longest}")
    targets = [
        harness.Target(name, detect_runtime(path), path, artifact=str(path))
        for name, path in zip(_short(artifacts), artifacts, strict=True)
    ]
    return harness.measure(targets, base, windows, protocol)


def _short(paths: Sequence[Path]) -> list[str]:
    """As many of each path's last parts as tell it from the others."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def evaluation_windows(artifact: Path, data: DataConfig) -> Windows:
    """The windows `artifact` would be scored on."""
    if artifact.is_file():
        tokenizer = Bundle.load(artifact).tokenizer
    else:
        tokenizer = load_tokenizer(artifact)
    few = data.model_copy(update={"calibration_windows": 1, "heldout_windows": 1})
    return prepare(few, load_documents(data.text), tokenizer, training=False).evaluation


def _targets(folder: Path, variant: VariantRecord) -> list[harness.Target]:
    found = [
        harness.Target(
            variant.name, "torch", folder / variant.artifact, variant.fingerprint, variant.artifact
        )
    ]
    if variant.onnx_artifact is not None:
        path = folder / variant.onnx_artifact
        found.append(
            harness.Target(variant.name, "onnxruntime", path, variant.fingerprint, variant.onnx_artifact)
        )
    return found


_Inner = list[tuple[str, int, PassRecord]]  # variant, index in its chain, step


def _inner_steps(variants: Sequence[VariantRecord]) -> tuple[_Inner, dict[str, str]]:
    """The steps that change weights and are not the end of their chain; and, of the ends, fingerprint ->
    variant: what is the end of another chain has been measured with that."""
    inner: _Inner = []
    ends: dict[str, str] = {}
    for variant in variants:
        changing = [(i, s) for i, s in enumerate(variant.steps) if not s.name.startswith("export")]
        if changing:
            ends.setdefault(changing[-1][1].fingerprint, variant.name)
        if variant.name != "base":
            inner += [(variant.name, i, s) for i, s in changing[:-1]]
    return inner, ends


def _step_targets(made: Made, inner: _Inner, ends: dict[str, str]) -> list[harness.Target]:
    """What of the inner steps is to be scored, each once."""
    found = dict.fromkeys(s.fingerprint for _, _, s in inner if s.fingerprint not in ends)
    return [harness.Target(step, "torch", made.steps[step], step) for step in found]


def _step_results(
    made: Made, inner: _Inner, ends: dict[str, str], results: Sequence[Result]
) -> list[StepResult]:
    """Quality and size after each inner step, from the results of variants and steps."""
    scored = {r.variant: r for r in results if r.runtime == "torch"}
    return [
        StepResult(
            variant=name, step_index=index, pass_name=step.name,
            nll=result.nll,
            delta_nll=result.delta_nll,
            delta_nll_ci95=result.delta_nll_ci95,
            kl_to_base=result.kl_to_base,
            kl_ci95=result.kl_ci95,
            weight_bytes=result.weight_bytes,
            file_bytes=disk_bytes(made.steps[step.fingerprint]),
        )
        for name, index, step in inner
        for result in [scored[ends.get(step.fingerprint, step.fingerprint)]]
    ]  # fmt: skip


def _references(data: TextData, base: Path) -> list[Reference]:
    """Unigram and trigram fitted on the training tokens; none where nothing was trained."""
    if not len(data.train):
        return []
    vocabulary = int(read_json(base / "config.json", f"{base}: no config.json")["vocab_size"])
    windows = data.evaluation
    return [Reference(**row) for row in reference_rows(data.train, windows.tokens, windows.bytes, vocabulary)]


def _readable(read: Callable[[Path], _T], path: Path) -> _T | None:
    """What an earlier call left; None where there is nothing, or it is of another version."""
    try:
        return read(path) if path.exists() else None
    except UserError:
        return None


def _trimmed(path: Path, base: Path | None) -> bool:
    """Whether an artifact has some of the base's tokens and no others."""
    files = [folder / "tokenizer.json" for folder in (base, path) if folder is not None]
    return len(files) == 2 and all(f.is_file() for f in files) and translation(*files) is not None


def _vocabulary(path: Path) -> Any:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    return Tokenizer.from_file(str(file)).get_vocab_size() if file.is_file() else math.nan
