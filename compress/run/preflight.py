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
from compress.artifact.folder import has_manifest
from compress.errors import UserError, staying
from compress.formats import Format
from compress.host.files import at_home, read_text
from compress.host.memory import available_memory_bytes
from compress.host.yaml_files import RECIPE_BYTES, parse_yaml
from compress.models.adapters import check_adapter
from compress.models.checkpoints import check_directory, hub_revision, load_tokenizer, meta_model
from compress.models.stacks import not_walked
from compress.passes.base import Pass
from compress.run.estimate import Estimate, estimate
from compress.run.label_checks import (
    check_judged,
    check_labels,
    check_pairs,
    check_prompt,
    epoch_tokens,
    headed,
    labels_of,
)
from compress.run.recipe import Recipe
from compress.run.registry import names as pass_names
from compress.run.registry import pass_class
from compress.run.store import STEPS
from compress.runtimes.providers import require_provider
from compress.tasks.base import longest_text
from compress.tasks.registry import task_of
from compress.text.documents import load_documents
from compress.text.windows import LABELLED
from compress.training.teaching.guidance import Guidance
from compress.training.teaching.teachers import require_teaches, side


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
    labels = labels_of(recipe, model)
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
            check_labels(recipe, labels, step, now, f"{_where(name)}.{step.name()}")
            if "labelled" in step.requires():
                pooling = getattr(step, "pooling", None)
                now = headed(now, labels, pooling, f"{_where(name)}.{step.name()}")
        chains[name], ends[name] = (parent, found), now
        _check_task(name, ends)
        if name == "base":
            check_judged(labels, now)
        _check_widths(recipe, name, model)
    if recipe.report.likelihood is not None:
        _check_model(str(at_home(recipe.report.likelihood)), "report.likelihood")
    check_prompt(recipe, labels, ends["base"])
    check_pairs(labels, ends["base"])
    size = estimate(recipe, model, measured=measured, epoch_tokens=epoch_tokens(labels, context))
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


def _check_task(name: str, ends: dict[str, Any]) -> None:
    """Refuse a variant that is for something else than the base, which it is compared with."""
    own, base = (task_of(ends[which].config) for which in (name, "base"))
    if own is not base:
        raise UserError(
            f"{_where(name)}: ends as {own.noun} ({own}) and the base as {base.noun} ({base}), so they "
            "cannot be compared; put what makes it one into the base"
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
