"""What a run will take: bytes of memory and of disk, and seconds, from shapes alone.

Disk is counted as it is filled. Each step leaves a folder; a step that several variants share is there once,
an export adds its own files only. A matrix with codes takes what a `QuantizedTensor` of its shape takes, any
other four bytes a weight (two in a GGUF of float16). While a step works, training keeps a checkpoint (weights
and two moments, once it takes longer than from one to the next), and a pass that streams its finished blocks;
the largest of these counts once, or the base's logits of a part of the text while measuring.

Memory is that of the process with its libraries, and of the step that takes most: training holds weights,
gradients, moments, the teacher, and activations and logits of a micro-batch, a pass that streams one block
and the text's activations, an export the model, its copy and the file, others the model and its copy.
Measuring holds the base whole, and logits of a window.

Time rests on the speed of a matrix product measured now: passes, scoring and prompts go at it, decoding in
torch at that of reading weights. Constants are those of runs that were watched (benchmarks/recipe_pages.py).
"""

import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from compress.formats import Format, QuantizedTensor
from compress.models.running import native_precision
from compress.models.stacks import block_names
from compress.passes.base import Pass
from compress.records.protocol import LOGITS_BYTES
from compress.run.recipe import Recipe
from compress.tasks.registry import task_of

_FLOAT = 4  # bytes
_PROCESS_BYTES = 450_000_000  # Python, torch and transformers, before any model
_EXPORT_BYTES = 100_000_000  # libraries of the exporters and of the runtimes that check
_TRAINING_BYTES = 150_000_000  # libraries that only training loads
_TRAINING_COPIES, _TUNING_COPIES = 6, 3  # of the weights: before, after, gradients, moments; the kept point
_ACTIVATION_BYTES = 5.2  # of a token, for each weight of the blocks over the width
_PAGE_BYTES = 1_000_000  # the report, records, evaluation windows
_SECONDS_PER_BYTE = 4.5e-8  # of a step's files: written, hashed, opened again and compared
_EXPORT_SECONDS = 4.0  # checking the file in its runtime
_MEASURE_SECONDS = 8.0  # per variant and runtime: processes, imports, loading
_GRID_PASSES = 24  # over each batch and length that an encoder is timed with
_SCORING = 1.2  # of a forward pass: comparing the logits
_PROBE_SECONDS = 0.5
_READING = 1e10  # bytes of weights per second, decoding in torch


@dataclass(frozen=True)
class Estimate:
    """What a run will take: bytes, and seconds for the passes and for measuring."""

    parameters: int
    memory_bytes: int
    disk_bytes: int
    pass_seconds: float
    measure_seconds: float


def estimate(recipe: Recipe, model: Any, *, measured: bool = True, epoch_tokens: int = 0) -> Estimate:
    """Of a recipe for a model without data; `measured`: whether its variants will be; `epoch_tokens`: about
    how many an epoch of labelled texts has."""
    parameters = sum(p.numel() for p in model.parameters())
    calibration = recipe.data.calibration_windows * recipe.data.window
    steps, ends = _steps(recipe)
    if epoch_tokens:
        steps = [(*chain[:-1], _in_tokens(chain[-1], epoch_tokens)) for chain in steps]
    before = [(chain[-1], _share(chain[:-1], model)) for chain in steps]
    flops = sum(step.flops(int(part * parameters), calibration) for step, part in before)
    exports = [part for step, part in before if step.kind == "export"]
    targets = [*(_share(chain, model) for chain in ends), *exports]
    encodes = not task_of(model.config).writes
    speed = _flops_per_second()
    left = _left(recipe, model, steps)
    return Estimate(
        parameters=parameters,
        memory_bytes=_memory(recipe, model, steps, left, measured),
        disk_bytes=_disk(recipe, model, steps, left, speed, measured),
        pass_seconds=flops / speed + sum(left) * _SECONDS_PER_BYTE + len(exports) * _EXPORT_SECONDS,
        measure_seconds=_measuring(recipe, parameters, targets, speed, encodes) if measured else 0.0,
    )


def _in_tokens(step: Pass, epoch_tokens: int) -> Pass:
    """A step that learns for so many epochs, as one that learns from so many tokens."""
    epochs = getattr(step, "epochs", None)
    return step if epochs is None else step.model_copy(update={"tokens": int(epochs * epoch_tokens)})


def _share(chain: tuple[Pass, ...], model: Any) -> float:
    """Of a model's parameters those that some passes leave."""
    return prod(step.share_left(model) for step in chain)


def _measuring(recipe: Recipe, parameters: int, targets: list[float], speed: float, encodes: bool) -> float:
    """Seconds for all variants in all their runtimes, by the share of the parameters that each has: scoring
    each window, rounds of timing, and of encoders the grid of batches and lengths."""
    protocol, forward = recipe.measure, 2.0 * parameters / speed  # of a token
    scoring = recipe.data.evaluation_windows * recipe.data.window * forward * _SCORING
    prompts = protocol.rounds * (1 + protocol.prefills_per_round) * protocol.prefill_tokens * forward
    decoding = protocol.rounds * protocol.decodes_per_round * parameters * _FLOAT / _READING
    timing = sum(targets) * protocol.batch * (prompts + decoding)
    if encodes:
        grid = sum(protocol.encoder_batches) * sum(protocol.encoder_lengths) * _GRID_PASSES * forward
        timing += min(protocol.encoder_seconds, sum(targets) * grid)
    timing = min(protocol.timing_seconds, timing)
    return len(targets) * _MEASURE_SECONDS + sum(targets) * scoring + timing


def _steps(recipe: Recipe) -> tuple[list[tuple[Pass, ...]], list[tuple[Pass, ...]]]:
    """Every step that a run takes, once, with those before it, the step itself last; and the passes of the
    base and of every variant. Exports are in none that follow them."""
    steps: dict[tuple[tuple[str, str], ...], tuple[Pass, ...]] = {}
    ends: dict[str, tuple[Pass, ...]] = {}
    for name in recipe.ordered():
        chain = recipe.chain(name)
        before = () if name == "base" else ends[chain.parent or "base"]
        for step in chain.passes:
            weights = tuple(earlier for earlier in before if earlier.kind != "export")
            before = (*weights, step)
            steps.setdefault(tuple((one.name(), one.model_dump_json()) for one in before), before)
        ends[name] = tuple(earlier for earlier in before if earlier.kind != "export")
    return list(steps.values()), list(ends.values())


def _left(recipe: Recipe, model: Any, steps: list[tuple[Pass, ...]]) -> list[int]:
    """Bytes that loading and each step leave behind, in order."""
    size, beside = sum(p.numel() for p in model.parameters()) * _FLOAT, _beside(recipe)
    found = [size + beside]
    for chain in steps:
        half = chain[-1].kind == "export" and getattr(chain[-1], "floats", None) == "float16"
        weights = _weights(model, _held(chain, model), 2 if half else _FLOAT)
        found.append(int(_share(chain, model) * weights) + beside)
    return found


def _disk(
    recipe: Recipe, model: Any, steps: list[tuple[Pass, ...]], left: list[int], speed: float, measured: bool
) -> int:
    size = sum(p.numel() for p in model.parameters()) * _FLOAT
    working = _logits(recipe, model) if measured else 0
    for chain, whole in zip(steps, left[1:], strict=True):
        step = chain[-1]
        if _trains(step) and step.kind != "tune":  # whose checkpoints hold scales
            own = int(_share(chain, model) * size)
            seconds = step.flops(own // _FLOAT, 0) / speed
            if seconds > float(getattr(step, "checkpoint_seconds", 0.0)):
                working = max(working, 3 * own)
        elif step.kind != "export" and step.streams:
            working = max(working, whole)
    return sum(left) + _PAGE_BYTES + working


def _logits(recipe: Recipe, model: Any) -> int:
    """Bytes of the base's logits that are kept at a time, as `measure.reference` cuts the text."""
    window = recipe.data.window * int(model.config.get_text_config().vocab_size) * _FLOAT
    return min(recipe.data.evaluation_windows, max(1, LOGITS_BYTES // window)) * window


def _held(chain: tuple[Pass, ...], model: Any) -> dict[str, Format | float]:
    """The format that each matrix has after a chain, or bytes of a weight where it is not decided yet."""
    held: dict[str, Format | float] = {}
    for step in chain:
        found: dict[str, Any] = dict(step.holds(model))
        if not found and (formats := step.writes()):
            wanted = getattr(step, "bits_per_weight", None)
            bits = wanted or sum(getattr(one, "bits", 8) for one in formats) / len(formats)
            found = dict.fromkeys(step.layers(model), bits / 8)
        held |= found
    return held


def _weights(model: Any, held: dict[str, Format | float], floats: int) -> int:
    """Bytes of a model's weights, tied ones once."""
    total, seen = 0.0, set()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            format = held.get(name) if key == "weight" else None
            if format is None:
                total += parameter.numel() * floats
            elif isinstance(format, float):
                total += parameter.numel() * format
            else:
                with torch.device("meta"):
                    codes = QuantizedTensor(format, tuple(parameter.shape))
                total += sum(b.numel() * b.element_size() for b in codes.buffers())
    return int(total)


def _beside(recipe: Recipe) -> int:
    """Bytes of a checkpoint's tokenizer and settings, which go into every folder."""
    folder = Path(str(recipe.model.checkpoint or ""))
    if recipe.model.checkpoint is None or not folder.is_dir():
        return 100_000
    files = [f for f in folder.iterdir() if f.is_file() and f.suffix in (".json", ".txt", ".model", ".jinja")]
    return sum(file.stat().st_size for file in files) + 10_000


def _memory(
    recipe: Recipe, model: Any, steps: list[tuple[Pass, ...]], left: list[int], measured: bool
) -> int:
    size = sum(p.numel() for p in model.parameters()) * _FLOAT
    text = model.config.get_text_config()
    tokens = recipe.data.calibration_windows * recipe.data.window
    parts = [model.get_submodule(name) for name in block_names(model)]
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    largest = max(_bytes(part) for part in (*parts, *tables) if part is not None)
    streaming = 3 * largest + 2 * tokens * int(getattr(text, "hidden_size", 0)) * _FLOAT
    # files of a checkpoint are read piece by piece, but for an encoder-decoder's; a model made here is whole
    streams = recipe.model.checkpoint is not None and task_of(model.config).stacks == 1
    most = [size if not streams else 0]
    for chain, written in zip(steps, left[1:], strict=True):
        step = chain[-1]
        if _trains(step):
            most.append(_TRAINING_BYTES + _training(step, _share(chain, model), model, recipe.data.window))
        elif step.kind == "export":
            most.append(_EXPORT_BYTES + 2 * size + written)  # the model, its copy, and the file
        else:
            most.append(streaming if step.streams and streams else 2 * size)
    if measured:
        most.append(size + 3 * recipe.data.window * int(text.vocab_size) * _FLOAT)
    return _PROCESS_BYTES + max(most)


def _trains(step: Pass) -> bool:
    """Whether it takes steps on the training text; others only count in it."""
    return "train" in step.requires() and hasattr(step, "batch")


def _training(step: Pass, share: float, model: Any, window: int) -> int:
    """Bytes while training what is left of a model: copies of its weights, the teacher's, and what a
    micro-batch leaves for the gradient, in the blocks and of the logits."""
    text, teacher = model.config.get_text_config(), "teacher" in step.requires()
    size = sum(p.numel() for p in model.parameters()) * _FLOAT
    blocks = sum(p.numel() for name in block_names(model) for p in model.get_submodule(name).parameters())
    tokens = int(getattr(step, "batch", 1)) * int(getattr(step, "window", None) or window)
    logits = (3.0 + 0.6 * teacher) * int(text.vocab_size) * _FLOAT
    activations = _ACTIVATION_BYTES * share * blocks / int(text.hidden_size)
    copies = _TUNING_COPIES if step.kind == "tune" else _TRAINING_COPIES
    return int(copies * share * size + teacher * size + tokens * (logits + activations))


def _bytes(module: Any) -> int:
    return sum(p.numel() for p in module.parameters()) * _FLOAT


def _flops_per_second() -> float:
    """Of matrix products of the size that small models have, in the precision that training uses; measured.

    The share that a whole model reaches of it, about a third, is part of the figure.
    """
    dtype = torch.bfloat16 if native_precision() == "bfloat16" else torch.float32
    a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    best, ends = float("inf"), time.perf_counter() + _PROBE_SECONDS
    while (started := time.perf_counter()) < ends:  # the fastest of many: others may run beside it
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024 * 512 * 512 / best / 3
