"""Everything that can be known to fail, checked before the first step; and what the run will take.

Nothing here loads weights: the model's shape is built on torch's meta device.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.artifact.applied import coverage_of
from compress.artifact.folder import has_manifest, whole
from compress.artifact.labels import fitted
from compress.errors import UserError, staying
from compress.formats import Format
from compress.host.files import at_home, read_text
from compress.host.memory import available_memory_bytes
from compress.host.yaml_files import RECIPE_BYTES, parse_yaml
from compress.models.adapters import check_adapter
from compress.models.checkpoints import check_directory, hub_revision, load_tokenizer, meta_model
from compress.models.heads import numbering, with_head, without_head
from compress.models.stacks import not_walked
from compress.passes.base import Pass
from compress.run.estimate import Estimate, estimate
from compress.run.recipe import Recipe
from compress.run.registry import names as pass_names
from compress.run.registry import pass_class
from compress.run.store import STEPS
from compress.runtimes.providers import require_provider
from compress.tasks.base import longest_text
from compress.tasks.decisions import require_metrics
from compress.tasks.embedding import Embedding
from compress.tasks.registry import task_learnt, task_of
from compress.text.documents import load_documents
from compress.text.labelled.base import Labelled
from compress.text.labelled.encoded import paired
from compress.text.labelled.load import load_labelled
from compress.text.windows import LABELLED
from compress.training.teaching.fields import TaskFields
from compress.training.teaching.guidance import Guidance
from compress.training.teaching.teachers import require_teaches, side

_CHARACTERS = 4  # of a token, about


@dataclass(frozen=True)
class Plan:
    """The tree of variants, the layers each pass touches, and the estimate.

    `coverage`: what there is to say of the share of the weights that a pass takes, by the pass's `id`.
    """

    chains: dict[str, tuple[str | None, list[tuple[Pass, list[str]]]]]
    estimate: Estimate
    coverage: dict[int, str] = field(default_factory=dict)


@staying("recipe")
def preflight(recipe: Recipe, folder: Path, *, measured: bool = True) -> Plan:
    """Check a recipe against its model, the machine and the output folder; `measured`: with what measuring
    takes.

    Raises:
        UserError: passes in an order that cannot work, a selector that matches nothing, windows longer
            than the model's context, an unusable checkpoint, no text, a folder of another run or one
            that cannot be written, too little disk, an execution provider that is absent.
    """
    check_folder(recipe, folder)
    require_provider(recipe.measure.provider)
    for source in (recipe.data.text, recipe.data.calibration_text):
        if source is not None and source != LABELLED:
            load_documents(source)
    model = _meta(recipe)
    labels = _labels(recipe, model)
    context = longest_text(model)
    if recipe.data.window > context:
        raise UserError(f"data.window: {recipe.data.window} tokens, but the model takes at most {context}")
    chains = {}
    ends: dict[str, Any] = {}  # the model, without data, that each chain ends with
    for name in recipe.ordered():
        check_order(recipe, name)
        for step in recipe.chain(name).passes:
            for source in step.reads():
                _check_model(source, f"{_where(name)}.{step.name()}")
            for source in step.texts():
                load_documents(source)
        _check_teachers(recipe, name, model)
        chain = recipe.chain(name)
        parent = None if name == "base" else chain.parent or "base"
        now, found = model if parent is None else ends[parent], []
        for i, step in enumerate(chain.passes):
            found.append((step, _layers(step, now, f"{_where(name)}.passes.{i}")))
            _check_labels(recipe, labels, step, now, f"{_where(name)}.{step.name()}")
            if "labelled" in step.requires():
                pooling = getattr(step, "pooling", None)
                now = _headed(now, labels, pooling, f"{_where(name)}.{step.name()}")
        chains[name], ends[name] = (parent, found), now
        _check_task(name, ends)
        if name == "base":
            _check_judged(labels, now)
        _check_widths(recipe, name, model)
    _check_prompt(recipe, labels, ends["base"])
    _check_pairs(labels, ends["base"])
    size = estimate(recipe, model, measured=measured, epoch_tokens=_epoch_tokens(labels, context))
    free = shutil.disk_usage(_existing(folder)).free
    done = sum(file.stat().st_size for file in (folder / STEPS).rglob("*") if file.is_file())
    if size.disk_bytes - done > free:
        raise UserError(
            f"{folder}: about {size.disk_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
            "free some space or choose another folder with --output"
        )
    available = available_memory_bytes()
    if size.memory_bytes > available:
        raise UserError(
            f"model: about {size.memory_bytes / 1e9:.1f} GB of memory are needed, "
            f"{available / 1e9:.1f} GB are free"
        )
    steps = [step for _, chain in chains.values() for step, _ in chain]
    shares = {id(step): coverage_of(step, model) for step in steps}
    said = {key: words for key, share in shares.items() if share and (words := share.words())}
    if labels is not None and not labels.heldout:
        learn = [id(step) for step in steps if "labelled" in step.requires()]
        said |= dict.fromkeys(learn, "stops by the texts it trains on, since none are held out")
    return Plan(chains, size, said)


def _epoch_tokens(labels: Labelled | None, longest: int) -> int:
    """About how many tokens the rows to learn from have, of which none has more than the longest text."""
    rows = () if labels is None else labels.train
    return sum(min(longest, 2 + len(row.text + (row.pair or "")) // _CHARACTERS) for row in rows)


def _labels(recipe: Recipe, model: Any) -> Labelled | None:
    """The labelled rows, which can be read and are numbered as the model's head does."""
    if recipe.data.labelled is None:
        return None
    require_metrics("data.labelled")
    labelled = fitted(load_labelled(recipe.data.labelled, recipe.seed), model.config)
    require_metrics("data.labelled", labelled.kind)
    numbering(model.config, labelled.kind, labelled.names)
    return labelled


def _check_labels(recipe: Recipe, labels: Labelled | None, step: Pass, model: Any, where: str) -> None:
    """Refuse a step that cannot take this model without labelled texts, or without other text besides."""
    task = task_of(model.config)
    if labels is None and step.wants_labels(task):
        raise UserError(
            f"{where}: {task.noun} learns from labelled texts, and there are none; give data.labelled"
        )
    if labels is not None and step.wants_labels(task) and task.labels != labels.kind:
        raise UserError(
            f"{where}: the labels of {labels.source} are of the kind '{labels.kind}', and the model is "
            f"{task.noun} ({task}); give labels that fit its head"
        )
    learns = labels is not None and "labelled" in step.requires()
    if learns and labels is not None and (reason := step.refuses_labels(labels.kind)) is not None:
        raise UserError(f"{where}.{reason}")
    if (
        labels is not None
        and recipe.data.text == LABELLED
        and isinstance(step, TaskFields)
        and step.unlabelled
    ):
        raise UserError(
            f"{where}.unlabelled: there is no text but that of the labelled rows; give another as data.text, "
            "or leave it at 0"
        )


def _check_prompt(recipe: Recipe, labels: Labelled | None, base: Any) -> None:
    """Refuse a template that nobody is asked by, and a decoder beside that cannot be asked."""
    decoder, task = recipe.report.likelihood, task_of(base.config)
    asked = recipe.data.labelled is not None and recipe.data.labelled.template is not None
    if decoder is not None and not asked:
        raise UserError(
            f"report.likelihood: {decoder} is asked by data.labelled.template, which is not given; write a "
            "prompt with {text} that ends with {label}"
        )
    if labels is None or not asked:
        return
    if labels.kind != "class":
        raise UserError(
            f"data.labelled.template: asks for one label of a text, and the labels of {labels.source} are of "
            f"the kind '{labels.kind}'; leave it out"
        )
    headed = task.judged_by(labels.kind)
    if not headed and not task.continues:
        raise UserError(
            f"data.labelled.template: {task.noun} ({task}) is not asked so, only a decoder; leave it out"
        )
    if headed and decoder is None:
        raise UserError(
            "data.labelled.template: the base has a head for labels, so nobody is asked; name a decoder "
            "under report.likelihood, or leave it out"
        )
    if not headed and decoder is not None:
        raise UserError(
            f"report.likelihood: {decoder} would stand beside a base with a head for labels, and this base "
            "is itself asked by the template; leave it out"
        )
    if decoder is not None:
        place = str(at_home(decoder))
        _check_model(place, "report.likelihood")
        if not (its := task_of(meta_model(str(whole(Path(place)))).config)).continues:
            raise UserError(
                f"report.likelihood: {decoder} is {its.noun} ({its}), which finds no label likely after a "
                "text; give a decoder"
            )


def _headed(model: Any, labels: Labelled | None, pooling: str | None, where: str) -> Any:
    """The model, without data, that learns these labels; `pooling`: as the step says."""
    if labels is None:
        raise UserError(f"{where}: learns labels, and there are none; give data.labelled")
    task = task_learnt(model.config, labels.kind, paired=paired(labels.train), pooling=pooling)
    if task is None:
        raise UserError(f"{where}: labels of the kind '{labels.kind}' are not learnt here")
    if isinstance(task, Embedding):
        with torch.device("meta"), staying(where):
            return without_head(model, task)
    if pooling is not None:
        raise UserError(
            f"{where}.pooling: is of pairs of texts that are embedded, and {labels.source} has labels of the "
            f"kind '{labels.kind}'; set labelled.kind to pair, or leave it out"
        )
    with torch.device("meta"), staying(where):
        return with_head(model, task, numbering(model.config, labels.kind, labels.names), 0)


def _check_pairs(labels: Labelled | None, base: Any) -> None:
    """Refuse a base that embeds texts, and rows of one text, which say nothing of how good it is."""
    task = task_of(base.config)
    if labels is not None and task.embeds and labels.kind == "number" and not paired(labels.train):
        raise UserError(
            f"labelled.pair: {labels.source} has one text in each row, and the base is {task.noun} that "
            "embeds texts, which is judged by two; name the column of the second, or fine-tune the base on "
            "the numbers"
        )


def _check_task(name: str, ends: dict[str, Any]) -> None:
    """Refuse a variant that is for something else than the base, which it is compared with."""
    own, base = (task_of(ends[which].config) for which in (name, "base"))
    if own is not base:
        raise UserError(
            f"{_where(name)}: ends as {own.noun} ({own}) and the base as {base.noun} ({base}), so they "
            "cannot be compared; put what makes it one into the base"
        )


def _check_judged(labels: Labelled | None, base: Any) -> None:
    """Refuse labels that a base with a head for others would not be judged by: they would be plain text."""
    task = task_of(base.config)
    if labels is not None and task.labels not in (None, labels.kind):
        raise UserError(
            f"data.labelled: the labels of {labels.source} are of the kind '{labels.kind}', and the base is "
            f"{task.noun} ({task}); give labels that fit its head, or put finetune into the base"
        )


def check_folder(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder that holds another run, or files that are no run, or that cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder with --output")
    check_writable(folder)
    if not folder.is_dir() or all(entry.name.startswith(".") for entry in folder.iterdir()):
        return
    if (folder / STEPS).is_dir() and not (folder / "recipe.yaml").exists():
        return  # a run whose folder was deleted under it, and filled again by what it was writing
    name = saved_name(folder)
    if name is None or not (folder / STEPS).is_dir():
        raise UserError(f"{folder}: holds files that are no run; choose another folder with --output")
    if name != recipe.name:
        raise UserError(
            f"{folder}: holds the run '{name}', not '{recipe.name}'; choose another folder with --output"
        )


def check_writable(path: Path) -> None:
    """Refuse a file or folder to write that cannot come to be where it is asked for."""
    place = _existing(path)
    if not (place.is_dir() or place == path.absolute()) or not os.access(place, os.W_OK):
        raise UserError(f"{path}: cannot be written; choose another place with --output")


def saved_name(folder: Path) -> str | None:
    """The name of the run a folder holds, or None."""
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        return None
    try:
        content = parse_yaml(read_text(saved, RECIPE_BYTES), str(saved))
    except UserError:
        return None
    return str(content["name"]) if isinstance(content, dict) and "name" in content else None


def check_order(recipe: Recipe, name: str) -> None:
    """Refuse a chain in which a pass comes after what it cannot follow, or without what it needs."""
    before: list[Pass] = []
    for variant in recipe.ancestry(name):
        for step in recipe.chain(variant).passes:
            if variant == "base" and "teacher" in step.requires():
                raise UserError(
                    f"base: {step.name()} learns from the finished base, so it cannot be part of it; "
                    "put it into a variant"
                )
            if variant == "base" and not step.in_base:
                raise UserError(
                    f"base: {step.name()} cannot be part of the base, since text is cut with its tokenizer; "
                    "put it into a variant"
                )
            for kind in sorted(step.only_after - {earlier.kind for earlier in before}):
                raise UserError(f"{_where(name)}: {step.name()} must come after a pass of the kind '{kind}'")
            reason = step.refuses(tuple(f for earlier in before for f in earlier.writes()))
            if reason is not None:
                raise UserError(f"{_where(name)}.{step.name()}: {reason}")
            for earlier in before:
                if step.cannot_follow(earlier):
                    raise UserError(
                        f"{_where(name)}: {step.name()} cannot come after {earlier.name()} "
                        f"({step.kind} after {earlier.kind}); put it before"
                    )
            if step.kind != "export":
                before.append(step)


def _check_widths(recipe: Recipe, name: str, model: Any) -> None:
    """Refuse an export of codes whose groups do not fit into rows of this model; its passes were checked."""
    held: dict[str, Format] = {}
    for variant in recipe.ancestry(name):
        for step in recipe.chain(variant).passes:
            if step.resizes:
                return  # rows are as long as it will make them
            held |= step.holds(model)
            taken = set(step.layers(model)) if step.kind == "export" else set()
            for layer in [layer for layer in held if layer in taken]:
                columns = int(model.get_submodule(layer).weight.shape[1])
                reason = step.refuses_layer(columns, held[layer])
                if reason is not None:
                    raise UserError(f"{_where(name)}.{step.name()}: {layer} {reason}")


def _check_model(source: str, where: str) -> None:
    """Refuse a model that is neither there nor can be one on a hub."""
    path = Path(source)
    if path.is_dir():
        if not has_manifest(path):
            check_directory(path)
    elif not path.is_file() and (path.is_absolute() or source.count("/") != 1):
        raise UserError(f"{where}: '{source}' is neither a directory, a .gguf file nor a hub id (owner/name)")
    elif not path.is_file():
        hub_revision(source)  # it is asked now, not by the step that reads it


def _check_teachers(recipe: Recipe, name: str, model: Any) -> None:
    """Refuse a teacher of another tokenizer or a shorter context than the step that learns from it."""
    before = [step for variant in recipe.ancestry(name)[:-1] for step in recipe.chain(variant).passes]
    for step in recipe.chain(name).passes:
        others = step.other_models() if isinstance(step, Guidance) else ()
        for source in (source for source in step.reads() if source in others):
            # a tokenizer that is made in the run, or changed on the way, is known only then
            known = recipe.model.checkpoint if all(earlier.in_base for earlier in before) else None
            student = side(known or "model", model, None if known is None else _words(known))
            teacher = side(source, meta_model(source), _words(source))
            window = getattr(step, "window", None) or recipe.data.window
            require_teaches(f"{_where(name)}.{step.name()}", student, teacher, window)
        before.append(step)


def _words(source: str) -> Any:
    return load_tokenizer(source, None if Path(source).exists() else hub_revision(source))


def _where(name: str) -> str:
    return name if name == "base" else f"variants.{name}"


def _layers(step: Pass, model: Any, where: str) -> list[str]:
    task = task_of(model.config)
    if not step.takes(task):
        takers = ", ".join(name for name in pass_names() if pass_class(name).takes(task))
        raise UserError(
            f"{where}.{step.name()}: does not take {task.noun} (model_type "
            f"'{model.config.model_type}'); those that do: {takers}"
        )
    if (step.resizes or not step.in_base) and model.config.get_text_config() is not model.config:
        raise UserError(
            f"{where}.{step.name()}: changes sizes, and those of a '{model.config.model_type}' lie in its "
            "text_config, where they are not changed; leave it out, or save the text model on its own"
        )
    with staying(f"{where}.{step.name()}"):
        found = step.layers(model)
    if "calibration" in step.requires() and (reason := not_walked(model)) is not None:
        raise UserError(f"{where}.{step.name()}: {reason}; take a pass without calibration")
    if not found:
        select = getattr(step, "select", ())
        names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:3]
        raise UserError(
            f"{where}.{step.name()}.select: {list(select)} matches no layer; "
            f"names look like {', '.join(names)}"
        )
    return found


def _meta(recipe: Recipe) -> Any:
    if recipe.model.create is not None:
        return meta_model(recipe.model.create.config())
    _check_model(str(recipe.model.checkpoint), "model")
    model = meta_model(str(recipe.model.checkpoint), for_passes=True)
    if recipe.model.adapter is not None:
        check_adapter(model, Path(recipe.model.adapter))
    return model


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
