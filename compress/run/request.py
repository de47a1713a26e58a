"""The recipe behind `compress-lm quantize`: from bits, runtimes and a size to passes, with the reasons.

What is known comes from `docs/results` and stands here once: which passes lose least at a width. Which widths
a runtime has kernels for, and which grid it multiplies fastest, its layout says (export/layout.py). A runtime
gets a chain of its own where its grid differs; runtimes of one grid share the codes. The original is exported
to ONNX and GGUF as well, so that each result stands beside it in its own runtime.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from compress.errors import UserError, nearest
from compress.export.compressed_tensors.sizes import CompressedTensorsLayout
from compress.export.gguf.sizes import GgufLayout
from compress.export.layout import Layout
from compress.export.onnx.sizes import OnnxLayout
from compress.formats.registry import format_from
from compress.models.checkpoints import load_tokenizer, meta_model
from compress.records.results import Result
from compress.run.recipe import Recipe
from compress.run.registry import pass_class
from compress.run.serving import serving_lines
from compress.runtimes.exported import EXPORTED
from compress.tasks.base import Task, longest_text
from compress.tasks.registry import task_of
from compress.text.documents import load_documents

Effort = Literal["quick", "normal", "best"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
FULL_WINDOWS = {"evaluation_windows": 20, "calibration_windows": 32, "heldout_windows": 8}
_WINDOW = 1024
_FEWEST = 24  # windows, below which shorter ones are cut
_SHORTEST = 64
_SHARE_FOR_TRAINING = 0.1  # of a text that is shorter than all windows
_FISHER_UP_TO = 2_000_000_000  # parameters: beyond, the gradients of a whole model take too much memory


@dataclass(frozen=True)
class Destination:
    """Where a file goes, and what is taken there.

    Attributes:
        export: the pass that writes for it.
        file: what is served: the folder that the pass leaves, or a file in it.
        layout: the grids it takes.
        symmetric: whether zero-points are left out where all layers have one width.
    """

    export: str
    file: str
    layout: Layout
    symmetric: bool


DESTINATIONS = {
    "onnx": Destination("export_onnx", "onnx", OnnxLayout(), False),
    "gguf": Destination("export_gguf", "gguf/model.gguf", GgufLayout(), True),
    "compressed-tensors": Destination(
        "export_compressed_tensors", "compressed-tensors", CompressedTensorsLayout(), False
    ),
}


@dataclass(frozen=True)
class Request:
    """What is wanted.

    Attributes:
        model: directory, `.gguf` file or hub id.
        to: names of `DESTINATIONS`.
        bits: of a weight; None: 4, or what a budget allows.
        budget_bytes: of what is shipped, for each runtime.
        text: as a recipe's; None: the source of Python's standard library.
        effort: quick, normal, best.
        threads: on the CPU; None: all cores.
        measured: whether the original is exported, too, to stand beside the result.
    """

    model: str
    to: tuple[str, ...] = ("onnx",)
    bits: int | None = None
    budget_bytes: int | None = None
    text: str | tuple[str, ...] | None = None
    effort: Effort = "normal"
    threads: int | None = None
    measured: bool = True


@dataclass(frozen=True)
class Quantized:
    """What was written.

    Attributes:
        folder: of the run, with `report.html` where it was measured.
        files: runtime -> the folder or file to ship.
        reasons: why these.
        results: of base and result in every runtime; empty where nothing was measured.
    """

    folder: Path
    files: dict[str, Path]
    reasons: list[str]
    results: list[Result]

    def serving(self) -> dict[str, list[str]]:
        """Three lines per runtime that serve its file."""
        return {to: serving_lines(to, file) for to, file in self.files.items()}


@dataclass(frozen=True)
class Choice:
    """What was chosen: the recipe, a sentence per decision, and variant and folder per runtime."""

    recipe: Recipe
    reasons: list[str]
    variants: dict[str, str]  # runtime -> variant


def choose(request: Request, name: str) -> Choice:
    """The best recipe known for a request.

    Args:
        request: what is wanted.
        name: of the recipe.

    Raises:
        UserError: a runtime that is unknown, has no kernel for the bits, or does not take this model; text
            that is too short.
    """
    model = meta_model(request.model, for_passes=True)
    bits = request.bits or 4
    _check(request, model, bits)
    task = task_of(model.config)
    reasons: list[str] = []
    chains: dict[str, list[dict[str, Any]]] = {}
    variants: dict[str, str] = {}
    for to in request.to:
        runtime = DESTINATIONS[to]
        steps = _steps(request, to, bits, task, model)
        known = next((v for v, chain in chains.items() if chain[: len(steps)] == steps), None)
        label = f"int{bits}" if request.budget_bytes is None else "budget"
        variants[to] = known or (label if label not in chains else f"{label}-{to}")
        chains.setdefault(variants[to], list(steps)).append({runtime.export: {}})
    reasons += _reasons(request, bits, chains, variants)
    data, why = _windows(request, model)
    recipe = Recipe.parse(
        {
            "name": name,
            "description": f"compress-lm quantize {request.model}",
            "threads": request.threads,
            "model": {"checkpoint": request.model},
            "data": data,
            "base": _exports_of_the_original(request) if request.measured else [],
            "variants": chains,
        },
        "quantize",
    )
    return Choice(recipe, [*reasons, *why], variants)


def _exports_of_the_original(request: Request) -> list[str]:
    """What makes the original stand beside each result in its own runtime, where that is installed.

    In transformers it is what it is in torch.
    """
    beside = [to for to in request.to if to != "compressed-tensors" and EXPORTED[to].installed]
    return [DESTINATIONS[to].export for to in beside]


def _check(request: Request, model: Any, bits: int) -> None:
    """Refuse, before any work, what a runtime cannot take."""
    if not request.to:
        raise UserError(f"--to: names no runtime; known: {', '.join(DESTINATIONS)}")
    for to in request.to:
        if to not in DESTINATIONS:
            raise UserError(f"--to: '{to}' is unknown; {nearest(to, DESTINATIONS)}")
        if request.budget_bytes is None and bits not in DESTINATIONS[to].layout.bits:
            known = ", ".join(map(str, DESTINATIONS[to].layout.bits))
            raise UserError(f"--bits: {to} has no kernel for {bits} bits; it has {known}")
        export = pass_class(DESTINATIONS[to].export)
        if not export.takes(task_of(model.config)):
            raise UserError(f"--to: {to} does not take a model of the kind {type(model).__name__}")
        try:
            export().layers(model)
        except UserError as error:
            raise UserError(f"--to {to}: {error}") from None


def _steps(request: Request, to: str, bits: int, task: Task, model: Any) -> list[dict[str, Any]]:
    """The passes that make the codes for one runtime."""
    runtime, layout = DESTINATIONS[to], DESTINATIONS[to].layout
    fields: dict[str, Any] = {}
    few = sum(p.numel() for p in model.parameters()) <= _FISHER_UP_TO
    thorough = _thorough(request, bits)
    if thorough and task.continues and few:
        fields["outputs"] = "fisher"
    if request.budget_bytes is not None:
        fields |= {"budget_bytes": request.budget_bytes, "runtime": to}
        steps: list[dict[str, Any]] = [{"quantize_auto": fields}]
    else:
        grid = layout.eight
        if bits < 8:
            grid = {"kind": f"int{bits}", "group": _group(to, model), "symmetric": runtime.symmetric}
        tables = layout.eight if bits >= 4 else {**grid, "kind": "int4"}  # as formats.registry.beside
        embeddings = tables if layout.tables else None
        if bits == 8:
            fields = {}  # errors of rows hardly matter there
        steps = [{"quantize_gptq": {"format": grid, "embeddings": embeddings, **fields}}]
    if thorough and task.continues and bits < 8:
        steps.append({"tune_scales": {}})
    return steps


def _thorough(request: Request, bits: int) -> bool:
    """Whether to take what loses less and takes several times as long: where much is lost, and on request."""
    return request.effort == "best" or (request.effort == "normal" and bits <= 3)


def _group(to: str, model: Any) -> int:
    """The runtime's group, or the half of it where rows are no multiple and it takes no shorter rest.

    Raises:
        UserError: it takes neither.
    """
    from compress.models.layers import linear_layers

    layout = DESTINATIONS[to].layout
    widths = {model.get_submodule(name).weight.shape[1]: name for name in linear_layers(model)}
    wrong = ""
    for group in (layout.groups[0], layout.groups[0] // 2):
        format = format_from({"kind": "int4", "group": group, "symmetric": DESTINATIONS[to].symmetric})
        found = [(n, why) for width, n in widths.items() if (why := layout.objection(format, width))]
        if not found:
            return group
        wrong = wrong or f"{found[0][0]}: {found[0][1]}"
    raise UserError(f"--to {to}: {wrong}")


def _reasons(
    request: Request, bits: int, chains: dict[str, list[dict[str, Any]]], variants: dict[str, str]
) -> list[str]:
    """A line per decision."""
    found = []
    if request.budget_bytes is not None and request.bits is not None:
        found.append(f"--bits {request.bits} does not bind: the budget decides each tensor's width")
    for to, variant in variants.items():
        names = [next(iter(step)) for step in chains[variant] if next(iter(step)) in _WHY]
        grid = _grid(next(iter(chains[variant][0].values())), DESTINATIONS[to].layout)
        found.append(f"{to}: {' then '.join(names)}; {grid}: what its kernels take")
    passes = {next(iter(step)): next(iter(step.values())) for chain in chains.values() for step in chain}
    found += [f"{name}: {why}" for name, why in _WHY.items() if name in passes]
    if any(fields.get("outputs") == "fisher" for fields in passes.values()):
        found.append("outputs: fisher: rows make good each other's errors by what they do to the loss")
    if bits < 8 and not _thorough(request, bits):
        found.append(
            "outputs: fisher and tune_scales are left out: they lose less, and take several times as long; "
            "--effort best has them"
        )
    return found


def _grid(fields: dict[str, Any], layout: Layout) -> str:
    """The grids that a quantizer's fields ask for, in words."""
    if "format" not in fields:
        bits, groups = (", ".join(map(str, sorted(each))) for each in (layout.bits, layout.groups))
        return f"{bits} bits, groups of {groups}" + ("" if layout.tables else ", embeddings in float")
    format = fields["format"]
    words = f"groups of {format['group']}" if "group" in format else "a scale per row"
    if "symmetric" in format:
        words += ", symmetric" if format["symmetric"] else ", with zero-points"
    return words if fields["embeddings"] else f"{words}, embeddings in float"


_WHY = {
    "quantize_gptq": "each layer makes good what those before it lost; it loses least at one width",
    "quantize_auto": "bits where they matter, by measured loss and an exact knapsack",
    "tune_scales": "scales learn the original's distribution, codes frozen: not a byte more",
}


def _windows(request: Request, model: Any) -> tuple[dict[str, Any], list[str]]:
    """The `data` section, and what there is to say of it."""
    reasons = []
    if request.text is None:
        reasons.append(
            "text: Python's standard library, as none was given: calibration and scores are of code; "
            "give --text of your own"
        )
    text = request.text or "stdlib"
    source: str | list[str] = text if isinstance(text, str) else list(text)
    window = min(_WINDOW, longest_text(model))
    need = window * sum(FULL_WINDOWS.values())
    tokens = _tokens(request.model, source, need)
    if tokens >= need * (1 + _SHARE_FOR_TRAINING):
        return {"text": source, "window": window, **FULL_WINDOWS}, reasons
    usable = int(tokens * (1 - _SHARE_FOR_TRAINING))
    while window > _SHORTEST and usable // window < _FEWEST:
        window //= 2
    count = usable // window
    if count < _FEWEST:
        raise UserError(
            f"--text: {tokens} tokens are too few to calibrate and to judge by; at least "
            f"{int(_FEWEST * _SHORTEST / (1 - _SHARE_FOR_TRAINING))} are needed"
        )
    shares = {name: max(2, count * share // 60) for name, share in FULL_WINDOWS.items()}
    reasons.append(
        f"text: {tokens} tokens, so windows are {window} long: {shares['calibration_windows']} to calibrate, "
        f"{shares['evaluation_windows']} to judge by"
    )
    return {"text": source, "window": window, **shares}, reasons


def _tokens(model: str, source: str | Sequence[str], enough: int) -> int:
    """Tokens of a text, counted until there are more than enough."""
    tokenizer = load_tokenizer(model)
    found = 0
    for document in load_documents(source):
        for start in range(0, len(document.text), 100_000):
            piece = document.text[start : start + 100_000]
            found += len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
            if found > 2 * enough:
                return found
    return found
