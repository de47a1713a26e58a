"""Everything that can be known to fail, checked before the first step; and what the run will take.

Nothing here loads weights: the model's shape is built on torch's meta device. Estimates of time rest on
the speed of a matrix product measured now; they are rough, and say so.
"""

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.artifact.applied import coverage_of
from compress.artifact.folder import MANIFEST
from compress.errors import UserError
from compress.formats import Format
from compress.host.memory import available_memory_bytes
from compress.models.checkpoints import check_directory, meta_model
from compress.models.running import native_precision
from compress.passes.base import Pass
from compress.run.recipe import Recipe
from compress.run.registry import names as pass_names
from compress.run.registry import pass_class
from compress.run.store import STEPS
from compress.runtimes.providers import require_provider
from compress.tasks.base import longest_text
from compress.tasks.registry import task_of
from compress.text.documents import load_documents

_FLOAT = 4  # bytes
_MEASURE_SECONDS = 12.0  # per variant and runtime: processes, imports, loading


@dataclass(frozen=True)
class Estimate:
    """What a run will take: bytes, and seconds for the passes and for measuring."""

    parameters: int
    memory_bytes: int
    disk_bytes: int
    pass_seconds: float
    measure_seconds: float


@dataclass(frozen=True)
class Plan:
    """The tree of variants, the layers each pass touches, and the estimate.

    `coverage`: what there is to say of the share of the weights that a pass takes, by the pass's `id`.
    """

    chains: dict[str, tuple[str | None, list[tuple[Pass, list[str]]]]]
    estimate: Estimate
    coverage: dict[int, str] = field(default_factory=dict)


def preflight(recipe: Recipe, folder: Path) -> Plan:
    """Check a recipe against its model, the machine and the output folder.

    Raises:
        UserError: passes in an order that cannot work, a selector that matches nothing, windows longer
            than the model's context, an unusable checkpoint, no text, a folder of another run or one
            that cannot be written, too little disk, an execution provider that is absent.
    """
    check_folder(recipe, folder)
    require_provider(recipe.measure.provider)
    for source in (recipe.data.text, recipe.data.calibration_text):
        if source is not None:
            load_documents(source)
    model = _meta(recipe)
    context = longest_text(model)
    if recipe.data.window > context:
        raise UserError(f"data.window: {recipe.data.window} tokens, but the model takes at most {context}")
    chains = {}
    for name in recipe.ordered():
        check_order(recipe, name)
        for step in recipe.chain(name).passes:
            for source in step.reads():
                _check_model(source, f"{_where(name)}.{step.name()}")
            for source in step.texts():
                load_documents(source)
        chain = recipe.chain(name)
        chains[name] = (
            None if name == "base" else chain.parent or "base",
            [
                (step, _layers(step, model, f"{_where(name)}.passes.{i}"))
                for i, step in enumerate(chain.passes)
            ],
        )
        _check_widths(recipe, name, model)
    estimate = _estimate(recipe, model)
    free = shutil.disk_usage(_existing(folder)).free
    if estimate.disk_bytes > free:
        raise UserError(
            f"{folder}: about {estimate.disk_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
            "free some space or choose another folder with --output"
        )
    available = available_memory_bytes()
    if estimate.memory_bytes > available:
        raise UserError(
            f"model: about {estimate.memory_bytes / 1e9:.1f} GB of memory are needed, "
            f"{available / 1e9:.1f} GB are free"
        )
    steps = [step for _, chain in chains.values() for step, _ in chain]
    shares = {id(step): coverage_of(step, model) for step in steps}
    said = {key: words for key, share in shares.items() if share and (words := share.words())}
    return Plan(chains, estimate, said)


def check_folder(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder that holds another run, or files that are no run, or that cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder with --output")
    check_writable(folder)
    if not folder.is_dir() or all(entry.name.startswith(".") for entry in folder.iterdir()):
        return
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
        content = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
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
        if not (path / MANIFEST).is_file():
            check_directory(path)
    elif not path.is_file() and (path.is_absolute() or source.count("/") != 1):
        raise UserError(f"{where}: '{source}' is neither a directory, a .gguf file nor a hub id (owner/name)")


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
    found = step.layers(model)
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
    return meta_model(str(recipe.model.checkpoint), for_passes=True)


def _estimate(recipe: Recipe, model: Any) -> Estimate:
    parameters = sum(p.numel() for p in model.parameters())
    size = parameters * _FLOAT
    passes = [step for name in recipe.ordered() for step in recipe.chain(name).passes]
    calibration = recipe.data.calibration_windows * recipe.data.window
    flops = sum(step.flops(parameters, calibration) for step in passes)
    exports = sum(step.kind == "export" for step in passes)
    measured = len(recipe.variants) + 1 + exports
    vocabulary = int(model.config.vocab_size)
    evaluation = recipe.data.evaluation_windows * recipe.data.window
    # the base's logits, a part at a time, while variants are compared
    logits = min(evaluation * vocabulary * 4, max(10**9, recipe.data.window * vocabulary * 4))
    # steps that hold float weights, each once, and exports of them; codes take less
    floats = sum(step.kind in ("train", "distill", "prune", "store") for step in passes) + 2
    return Estimate(
        parameters=parameters,
        memory_bytes=3 * size + 10**9,
        disk_bytes=floats * size + len(recipe.variants) * size // 2 + logits,
        pass_seconds=flops / _flops_per_second(),
        measure_seconds=measured * (_MEASURE_SECONDS + evaluation * parameters * 4 / 5e10),
    )


def _flops_per_second() -> float:
    """Of matrix products of the size that small models have, in the precision that training uses; measured.

    The share that a whole model reaches of it, about a third, is part of the figure.
    """
    dtype = torch.bfloat16 if native_precision() == "bfloat16" else torch.float32
    a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024 * 512 * 512 / best / 3


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
