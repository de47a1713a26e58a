"""What the command line and notebooks call: run a recipe, measure artifacts, compare runs.

Joins the two wings: what `pipeline` made is what `measure` reloads from disk, and `report` draws.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from compress import report
from compress.artifact.applied import Given, windows_of
from compress.artifact.folder import disk_bytes
from compress.artifact.labels import GivenLabels
from compress.errors import UserError
from compress.host.files import at_home, read_text
from compress.host.machine import machine, usable_cores, versions
from compress.host.processes import on_this_machine
from compress.measure import harness
from compress.measure.artifacts import measure_artifacts
from compress.measure.baselines import references_beside
from compress.measure.flips import Flips
from compress.measure.inner_steps import InnerSteps
from compress.measure.label_references import label_references
from compress.measure.places import exports_in, not_measured, targets_of
from compress.measure.prompt_reference import likelihood_reference
from compress.measure.turns import Target
from compress.models.checkpoints import load_config, load_tokenizer, meta_model
from compress.models.unchanged import unchanged_process
from compress.records.base import write_whole
from compress.records.flips import LabelReference
from compress.records.protocol import MeasureProtocol
from compress.records.results import Result, read_results, write_results
from compress.records.run import RunRecord, Sample, SampleBook
from compress.report.text import Results
from compress.run.identity import FileHashes, identity
from compress.run.pipeline import HASHES, Made, join, make
from compress.run.preflight import preflight
from compress.run.recipe import Recipe
from compress.run.request import DESTINATIONS, Effort, Quantized, Request, choose
from compress.run.store import STEPS, StepStore, alone, show
from compress.tasks.registry import task_of
from compress.text.examples import Examples
from compress.text.framing import prompt_of
from compress.text.windows import DataConfig

Say = Callable[[str], None]
_T = TypeVar("_T")


def run(recipe: Recipe, folder: Path | str, say: Say = print) -> RunRecord:
    """Run a recipe: preflight, passes, measurement, report. Call again to resume.

    Leaves `recipe.yaml`, a folder per variant, `results.jsonl`, `run.json`, `report.html` and `report.md`.

    In a process that `torchrun` or `accelerate launch` started this is for the main one; `take_part` is for
    the others.

    Raises:
        UserError: whatever the preflight, a pass, or the disk refuses.
    """
    return _tell_and_report(recipe, make_artifacts(recipe, folder, say), say)


def _tell_and_report(recipe: Recipe, made: Made, say: Say) -> RunRecord:
    """The second half of `run`: measure what was made, and draw the page."""
    with (
        _still_there(made.folder),
        alone(made.folder),
        unchanged_process(threads_for(recipe)),
    ):
        record = tell(recipe, made, say)
        write_report(made.folder)
    return record


def make_artifacts(recipe: Recipe, folder: Path | str, say: Say = print) -> Made:
    """The first half of `run`: everything but measuring and reporting, which a later `run` catches up on.

    Raises:
        UserError: whatever the preflight, a pass, or the disk refuses.
    """
    folder = Path(folder)
    with unchanged_process(threads_for(recipe)):
        return _make(recipe, folder, say, measured=False)


@contextmanager
def _still_there(folder: Path) -> Iterator[None]:
    """What fails because somebody deleted the run's folder meanwhile says so."""
    try:
        yield
    except (UserError, OSError):
        if (folder / STEPS).is_dir():
            raise
        raise UserError(f"{folder}: was deleted or moved while the run used it; run again") from None


def _make(recipe: Recipe, folder: Path, say: Say, *, measured: bool = True) -> Made:
    preflight(recipe, folder, measured=measured)
    try:
        (folder / STEPS).mkdir(parents=True, exist_ok=True)  # what tells a run's folder from others
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output") from None
    with _still_there(folder), alone(folder):
        write_whole(folder / "recipe.yaml", recipe.to_yaml())
        return make(recipe, folder, say)


def quantize(
    model: Path | str,
    bits: int | None = None,
    to: Sequence[str] | str = "onnx",
    out: Path | str = "quantized",
    *,
    text: str | Path | Sequence[str] | None = None,
    budget_bytes: int | None = None,
    effort: Effort = "normal",
    threads: int | None = None,
    measured: bool = True,
    say: Say = print,
) -> Quantized:
    """Quantize a model for runtimes by the best recipe known for that, and measure what was written.

    `out` becomes the folder of a run: called again with the same arguments it goes on where it was.

    Args:
        model: directory, `.gguf` file or hub id.
        bits: of a weight; by default 4, or what `budget_bytes` allows.
        to: `onnx`, `gguf`, `compressed-tensors`; one or several.
        out: where to write.
        text: to calibrate and to judge by; by default the source of Python's standard library.
        budget_bytes: the most that what is shipped may take, per runtime.
        effort: `quick`, `normal`, or `best` (tunes scales and weighs outputs at 4 bits, too).
        threads: on the CPU, of passes and of measuring; by default all cores.
        measured: False: write and check only.
        say: gets a line per decision and step.

    Raises:
        UserError: before any work, what a runtime cannot take; later, what a pass refuses.
    """
    names = (to,) if isinstance(to, str) else tuple(to)
    texts = None if text is None else str(text) if isinstance(text, str | Path) else tuple(map(str, text))
    request = Request(str(model), names, bits, budget_bytes, texts, effort, threads, measured)
    choice = choose(request, Path(out).absolute().name)
    for reason in choice.reasons:
        say(reason)
    made = make_artifacts(choice.recipe, out, say)
    for to in names:
        show(made.folder / choice.variants[to] / to, made.folder / to)
    files = {to: made.folder / DESTINATIONS[to].file for to in names}
    for file in files.values():
        if budget_bytes is not None and (size := disk_bytes(file)) > budget_bytes:
            raise UserError(
                f"--budget: {file} has {size:,} bytes of {budget_bytes:,}, which was foreseen wrongly; "
                "please report it, and give a smaller budget"
            )
    results = Results()
    if measured:
        _tell_and_report(choice.recipe, made, say)
        results.extend(load_run(made.folder)[1])
    return Quantized(made.folder, files, choice.reasons, results)


def take_part(recipe: Recipe, folder: Path) -> None:
    """What the processes beside the main one do: their share of the training, and nothing else.

    Raises:
        UserError: whatever a pass refuses.
    """
    with unchanged_process(threads_for(recipe)):
        join(recipe, folder)


def threads_for(recipe: Recipe) -> int:
    """CPU threads of the passes: the recipe's, or all cores, shared by the processes that run."""
    return recipe.threads or max(1, usable_cores() // on_this_machine()[1])


def tell(recipe: Recipe, made: Made, say: Say = print) -> RunRecord:
    """Measure everything that was made; results of an earlier, interrupted call are taken over."""
    missing = not_measured(made.variants)
    for name, reason in missing.items():
        say(f"{name}: written, {reason}")
    folder, windows = made.folder, made.evaluation
    protocol = (
        recipe.measure
        if recipe.measure.threads
        else recipe.measure.model_copy(update={"threads": recipe.threads})
    )
    path = folder / "results.jsonl"
    base = folder / "base"
    targets = [t for variant in made.variants for t in targets_of(folder, variant)]
    tokenizer = load_tokenizer(base)
    config = load_config(base)
    task = task_of(config)
    prompt = prompt_of(tokenizer, recipe.report.prompt, continues=task.continues)
    earlier = _readable(RunRecord.read, folder / "run.json")
    work = StepStore(folder).working  # what a kill leaves here, the next call sweeps up
    work.mkdir(exist_ok=True)
    book = work / "samples.json"
    kept = [s for record in (earlier, _readable(SampleBook.read, book)) if record for s in record.samples]
    samples = {(s.variant, s.runtime): s for s in kept if s.prompt == recipe.report.prompt}
    flips = Flips(work / "flips.json", windows, tokenizer, earlier.flips if earlier else ())
    done = [
        r
        for r in _readable(read_results, path) or []
        if (not task.writes or (r.variant, r.runtime) in samples) and flips.covers(r)
    ]
    write_results(path, done)

    def keep_sample(target: Target, tokens: list[int]) -> None:
        key = (target.variant, target.runtime)
        samples[key] = Sample(
            variant=key[0], runtime=key[1], prompt=recipe.report.prompt, text=tokenizer.decode(tokens)
        )
        SampleBook(samples=list(samples.values())).write(book)

    inner = InnerSteps.of(made.variants)
    known = earlier is not None and earlier.variants == made.variants
    known = known and len(harness.taken_over(targets, windows, protocol, done)) == len(targets)
    unfinished = work / "measured.json"
    found = harness.measure(
        targets, base, windows, protocol, steps=[] if known else inner.targets(made.steps), done=done,
        workdir=work, unfinished=unfinished,
        continuation=harness.Continuation(prompt, recipe.report.sample_tokens), on_sample=keep_sample,
        on_scores=flips.keep, on_result=lambda result: harness.save_result(path, result),
    )  # fmt: skip
    results = found[: len(targets)]
    steps = earlier.step_results if earlier and known else inner.results(made.steps, found)
    write_results(path, results)
    simple = work / "references.json"
    references = references_beside(
        made.variants[0].steps, config, results, made.data,
        recipe.report.references if windows is made.data.evaluation else (), seed=recipe.seed,
        earlier=earlier.references if earlier else [], kept=simple, say=say,
    )  # fmt: skip
    record = RunRecord(
        recipe_name=recipe.name,
        base="base",
        variants=made.variants,
        data=made.data_record,
        machine=machine(),
        versions=versions(),
        references=references,
        samples=[samples[t.variant, t.runtime] for t in targets if (t.variant, t.runtime) in samples],
        step_results=steps,
        not_measured=missing,
        flips=flips.of(results),
        label_references=_beside_labels(recipe, made, earlier, protocol, say),
    )
    record.write(folder / "run.json")
    book.unlink(missing_ok=True)
    unfinished.unlink(missing_ok=True)
    flips.forget()
    simple.unlink(missing_ok=True)
    return record


def _beside_labels(
    recipe: Recipe, made: Made, earlier: RunRecord | None, protocol: MeasureProtocol, say: Say
) -> list[LabelReference]:
    """Simple models of the training texts, and the decoder that the recipe asks for labels."""
    labelled, known = made.judging or made.data.labelled, earlier.label_references if earlier else ()
    if labelled is None or not isinstance(made.evaluation, Examples):
        return []
    rows = label_references(labelled, seed=protocol.seed, earlier=known)
    decoder, config = recipe.report.likelihood, recipe.data.labelled
    if decoder is not None and config is not None and config.prompt is not None:
        place = str(at_home(decoder))
        files = " ".join(identity(place, FileHashes(made.folder / HASHES)))
        rows.append(
            likelihood_reference(
                labelled.evaluation, config.prompt, place, files, threads=protocol.threads,
                seed=protocol.seed, earlier=known, say=say,
            )
        )  # fmt: skip
    return rows


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
    return RunRecord.read(folder / "run.json"), results, read_text(recipe)


def compare(folders: Sequence[Path], output: Path) -> Path:
    """One page over several runs."""
    write_whole(output, report.compare([load_run(folder) for folder in folders]))
    return output


def bench(
    artifacts: Sequence[Path],
    data: DataConfig,
    base: Path | None = None,
    protocol: MeasureProtocol | None = None,
    *,
    labelled: GivenLabels | None = None,
    verify: bool = True,
    say: Say = lambda line: None,
) -> Results:
    """Measure existing artifacts or plain model directories, these and no others; see `measure_artifacts`."""
    with unchanged_process():
        results = measure_artifacts(
            artifacts, data, base, protocol, labelled=labelled, verify=verify, say=say
        )
        return Results(results)


def measure(
    artifact: Path | str | Sequence[Path | str],
    *,
    base: Path | str | None = None,
    text: Given = "stdlib",
    labelled: GivenLabels | None = None,
    protocol: MeasureProtocol | None = None,
    verify: bool = True,
) -> Results:
    """Measure artifacts and their exports from disk, each in its runtime and a fresh process of its own.

    Args:
        artifact: folders or `.gguf` files; exports inside a folder are measured, too.
        base: the model that they are compared with; it comes first.
        text: as a recipe's; a `DataConfig` says how many windows, and how long.
        labelled: texts with labels to judge by in the place of text: a file, of which the part counts that a
            recipe leaves out of training, a `LabelledConfig`, or rows.
        protocol: how speed and memory are measured.
        verify: compare the SHA-256 of every file with the one that is stated beside it.

    Returns:
        A line per artifact and runtime; printed, a table.

    Raises:
        UserError: as `measure_artifacts`.
    """
    given = [artifact] if isinstance(artifact, Path | str) else list(artifact)
    paths = [Path(path) for path in ([] if base is None else [base]) + given]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such artifact")
    found = [p for path in paths for p in (path, *exports_in(path))]
    with unchanged_process():
        data = windows_of(text, meta_model(str(paths[0])))
    first = paths[0] if base is not None else None
    found = list(dict.fromkeys(found))
    return bench(found, data, first, protocol, labelled=labelled, verify=verify)


def _readable(read: Callable[[Path], _T], path: Path) -> _T | None:
    """What an earlier call left; None where there is nothing, or it is of another version."""
    try:
        return read(path) if path.exists() else None
    except UserError:
        return None
