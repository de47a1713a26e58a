"""quantize_auto: bits where they matter, under a budget.

    1. measure what each layer loses at the model's output rounded alone (layerwise/sensitivity.py);
    2. choose a width for every layer, and one for embedding and head, so that the summed losses are least
       and the bytes of the written artifact stay within the budget (solvers/knapsack.py, exact; or least
       bytes for a summed loss);
    3. quantize as quantize_gptq does, each layer in its own format (layerwise/quantize.py).

With `coded` every tensor gets a rate in quarters of a bit (formats/coded/coded.py): fewer bytes in the file
for the same loss, a byte per weight in memory.

The losses of single layers do not tell all of what they do together: `trust` shrinks every layer's level
towards the others' before widths are chosen (solvers/losses.py); `largest_kl` takes the losses as they are.
Those of embedding and head are wholly trusted, and nothing after them makes their errors good.

`runtime` says for whom: `budget_bytes` counts the files that it is served, and candidates are the grids that
it has kernels for (export/layout.py). In a recipe it is the export that follows, with that one's settings,
else torch. Of torch every file of the artifact's folder counts (codes, scales, header, configuration,
tokenizer, manifest), but no exports inside it; text is weighed at its longest (artifact/sizes.py), one or two
kilobytes and some ten bytes per tensor too much. Of an export the writer itself is asked, with zeros for
codes, a few times: the graph, its padding and what it merges depend on the widths (export/weighing.py). The
files are never larger than the budget; they are smaller by less than the next step of some tensor takes.
`reserve_bytes` are left besides for what later passes of a chain add to a manifest that is counted.
Needs calibration text; its last windows serve to measure, the others to fit.
"""

import json
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.export.layout import Layout, TorchLayout, Weigher
from compress.export.registry import Named, Runtime, runtime_of
from compress.formats import Coded, Format
from compress.formats.swap import embedding_names, quantize_embeddings
from compress.layerwise.budget import Candidates, Chosen
from compress.layerwise.quantize import LayerSolver, quantize_sequentially
from compress.layerwise.sensitivity import Probe, embedding_losses, layer_losses
from compress.models.layers import linear_layers, matrix
from compress.passes.base import Kind, Need, Pass
from compress.records.manifest import changed_settings
from compress.solvers.losses import extended, tempered

Width = Literal[2, 3, 4, 5, 6, 8]
_LEAST_OF_TABLES = 3  # bits that an embedding is offered where nobody says
_RESERVED = 4096  # bytes, for what a later pass notes
_MEASURED_BITS = 3  # losses there stand far above the noise of bfloat16
_COMPARED_AT = 3  # bits at which tensors' levels are compared
# Of the layers' summed loss, what is left when each makes good what those before it lost: on SmolLM2-135M the
# whole model's KL was 0.51 to 0.64 of the sum, from 3.3 to 5.5 bits, with the embeddings' loss in both.
_LEFT = 0.5
_PER_BIT = 4  # coded rates to choose from
_LARGEST_RATE = 7
# Bytes, more than a manifest has of this pass beside its configuration: the record, and a line for a width.
_NOTED, _LABELLED = 1536, 48


class QuantizeAuto(Pass, LayerSolver):
    """Widths per layer by measured loss and an exact knapsack, then GPTQ with the asymmetric target."""

    kind: ClassVar[Kind] = "quantize"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    runtime: Annotated[Runtime | None, Named] = Field(
        None,
        description="for whom: torch, onnx, gguf or compressed-tensors; null: the export that follows, else "
        "torch",
    )
    budget_bytes: int | None = Field(None, ge=1, description="of all files that the runtime is served")
    bits_per_weight: float | None = Field(
        None, gt=0, le=9, description="of linear layers and embeddings, scales and zero-points included"
    )
    largest_kl: float | None = Field(None, gt=0, description="sum of the layers' predicted losses, in nats")
    widths: tuple[Width, ...] | None = Field(
        None, min_length=1, description="bits that a linear layer may get; null: all that the runtime takes"
    )
    embedding_widths: tuple[Width, ...] | None = Field(
        None,
        min_length=1,
        description="bits that embedding and head may get; null: from 3 on all that the runtime takes, and "
        "float in compressed-tensors",
    )
    coded: bool = Field(
        False, description="entropy-code all codes: fewer bytes in the file, a byte per weight in memory"
    )
    trust: float = Field(
        0.5, ge=0, le=1, description="how far measured losses decide between layers; 0: all alike; 1: alone"
    )
    group: int | None = Field(
        None,
        ge=16,
        description="columns that share a scale below 8 bits; null: 64 in torch, 32, 64 or 128 in onnx and "
        "compressed-tensors, 32 in gguf",
    )
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave float")
    measured_windows: int = Field(4, ge=1, description="of the calibration windows, to measure losses on")
    measured_tokens: int = Field(256, ge=8, description="of each of them")
    moment_windows: int = Field(8, ge=1, description="of the others, for the errors of single layers")
    reserve_bytes: int | None = Field(
        None,
        ge=0,
        description="of the budget, for what later passes note; null: 4096, or 0 where none will be counted",
    )

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = ("budget_bytes", "bits_per_weight", "largest_kl")
        given = [name for name in goals if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(goals)}; given: {', '.join(given) or 'none'}")
        return self

    @model_validator(mode="after")
    def _taken(self) -> Self:
        layout = self._layout
        if self.coded and layout.kind != "torch":
            raise ValueError(f"coded: {layout.kind} has no kernel for streams of codes; leave coded out")
        if self.embedding_widths is not None and not layout.tables:
            raise ValueError(f"embedding_widths: {layout.kind} keeps embeddings in float; leave them out")
        for name in ("widths", "embedding_widths"):
            for bits in getattr(self, name) or ():
                if bits not in layout.widths():
                    known = ", ".join(map(str, layout.widths()))
                    raise ValueError(
                        f"{name}: {layout.kind} has no kernel for {bits} bits; it has {known}; leave {name} "
                        "out for all of these"
                    )
        return self

    @property
    def _layout(self) -> Layout:
        return self.runtime or TorchLayout()

    def followed_by(self, later: Sequence[Pass]) -> Pass:
        """With the runtime of the export that follows, the widths it takes, and room for what is noted.

        Raises:
            ValueError: widths that the runtime has no kernel for; exports for several, and a budget of bytes.
        """
        written = [layout for step in later if (layout := step.layout()) is not None]
        layout = runtime_of(self.runtime, written, exactly=self.budget_bytes is not None)
        between = [step for step in later if layout.kind == "torch" or step.kind != "export"]
        reserve = self.reserve_bytes
        if reserve is None:
            reserve = _RESERVED if between and layout.noted else 0
        chosen = {"runtime": layout.model_dump(), "reserve_bytes": reserve}
        settled = type(self).model_validate({**self.model_dump(), **chosen})
        widths = {"widths": settled._bits(), "embedding_widths": settled._embedding_bits() or None}
        return settled.model_copy(update=widths)

    def _bits(self) -> tuple[Width, ...]:
        return self.widths or _offered(self._layout.bits)

    def _embedding_bits(self) -> tuple[Width, ...]:
        """None where tables stay float."""
        layout = self._layout
        if not layout.tables:
            return ()
        return self.embedding_widths or _offered(b for b in layout.bits if b >= _LEAST_OF_TABLES)

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers, then embedding and head.

        Raises:
            UserError: rows that the runtime cannot take in any of the formats.
        """
        self.check_outputs(model)
        linears = linear_layers(model, self.select, self.skip)
        tables = embedding_names(model) if linears and self._layout.tables else []
        for names, formats in ((linears, self._choices(self._bits())), (tables, self._table_choices())):
            for name in names:
                self._taken_of(name, matrix(model.get_submodule(name)).shape[1], formats)
        return linears + tables

    def writes(self) -> tuple[Format, ...]:
        """All formats that it chooses from."""
        return tuple(dict.fromkeys((*self._choices(self._bits()), *self._table_choices())))

    def plan(self) -> str:
        """The widths to choose from."""
        bits = ", ".join(map(str, self._bits()))
        tables = ", ".join(map(str, self._embedding_bits())) or "float"
        return f"for {self._layout.kind}: {bits} bits, embeddings {tables}"

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """As quantize_gptq, and a forward pass from each layer on over the tokens measured."""
        measured = 2.0 * parameters * self.measured_windows * self.measured_tokens
        solving = (4.0 + 2.5) * parameters * calibration_tokens + self.flops_of_outputs(parameters)
        return solving + 100 * measured

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Measure, choose, quantize.

        Notes: `layers` and `embeddings` (how many of each width), `predicted_kl` (sum over tensors),
        `planned_bytes` of the artifact, `measuring_seconds`, and those of the solver.

        Raises:
            UserError: no choice of widths keeps to the budget or to the largest KL.
        """
        result = bundle.clone()
        model = result.model.to(context.device)
        windows = torch.from_numpy(context.data.calibration.tokens).long()
        names = linear_layers(model, self.select, self.skip)
        tables = embedding_names(model) if self._layout.tables else []
        sizes = self._weigher(bundle, [*names, *tables], context)
        candidates, taken = self._candidates(names, tables, sizes)
        if self.budget_bytes is not None:  # before what takes long
            candidates.least(sizes.total, self.budget_bytes, self._reserve)
        started = time.monotonic()
        losses = self._measure(bundle, model, names, windows, context)
        seconds = time.monotonic() - started
        chosen, predicted = self._choice(candidates, taken, losses, sizes)
        plan = candidates.plan(chosen)
        notes: dict[str, Any] = {
            "layers": dict(sorted(Counter(self._label(plan[name]) for name in names).items())),
            "embeddings": self._label(plan[tables[0]]) if tables else "float",
            "predicted_kl": predicted,
            "planned_bytes": sizes.total(plan),
            "measuring_seconds": seconds,
        }
        solved = quantize_sequentially(
            model,
            windows,
            {name: plan[name] for name in names},
            self,
            masks=bundle.masks,
            precision=context.precision,
            seed=context.seed,
            what=self.name(),
        )
        if tables:
            quantize_embeddings(model, plan[tables[0]])
        solved["raised_damping"] = len(solved["raised_damping"])
        model.to("cpu")
        return result.evolve(notes={**notes, **solved})

    def _measure(
        self, bundle: Bundle, model: nn.Module, names: list[str], windows: Tensor, context: Context
    ) -> dict[str, list[float]]:
        """Losses per tensor and choice; those of embedding and head together stand at the embedding."""
        heldout = min(self.measured_windows, max(len(windows) - 1, 1))
        fitted = windows[:-heldout][: self.moment_windows] if len(windows) > heldout else windows
        probe = Probe(model, windows[-heldout:, : self.measured_tokens], context.precision)
        tables: dict[str, list[float]] = {}
        if bits := self._embedding_bits():
            found = embedding_losses(model, self._measured(bits), probe)
            tables[embedding_names(model)[0]] = self._for_choices(bits, found)
        layers = layer_losses(
            model,
            names,
            self._measured(self._bits()),
            self._formats(_MEASURED_BITS)[0],
            probe,
            fitted,
            masks=bundle.masks,
            damping=self.damping,
            batch=self.batch,
            precision=context.precision,
        )
        return {name: self._for_choices(self._bits(), found) for name, found in layers.items()} | tables

    def _weigher(self, bundle: Bundle, modules: list[str], context: Context) -> Weigher:
        """What weighs plans for the runtime."""
        stated = json.dumps([self.model_dump(mode="json"), changed_settings(self)], indent=2)
        config = textwrap.indent(stated, " " * 8)  # as it will stand in the manifest
        noted = len(config.encode()) + _NOTED + _LABELLED * len(self.writes())
        return self._layout.weigher(bundle, modules, noted, context.workdir / "weighed")

    def _candidates(
        self, names: list[str], tables: list[str], sizes: Weigher
    ) -> tuple[Candidates, list[list[int]]]:
        """What every set of layers, and embedding and head, may become, as numbers of all choices, too."""
        size = sizes.share if self.bits_per_weight is None else sizes.stored
        sets = self._layout.together(names)
        members = [*sets, *([tables] if tables else [])]  # of what gets one format
        offered = [self._choices(self._bits())] * len(sets) + [self._table_choices()] * bool(tables)
        columns = [sizes.shapes[together[0]][1] for together in members]
        taken = [
            [k for k, format in enumerate(each) if self._layout.objection(format, width) is None]
            for each, width in zip(offered, columns, strict=True)
        ]
        formats = [tuple(each[k] for k in kept) for each, kept in zip(offered, taken, strict=True)]
        costs = [
            [sum(size(name, format) for name in together) for format in each]
            for together, each in zip(members, formats, strict=True)
        ]
        return Candidates(members, formats, costs), taken

    def _choice(
        self, candidates: Candidates, taken: list[list[int]], losses: dict[str, list[float]], sizes: Weigher
    ) -> tuple[Chosen, float]:
        """A format for every set, and the summed loss predicted for them."""
        summed = [
            [sum(row) for row in zip(*(losses[name] for name in each if name in losses), strict=True)]
            for each in candidates.members
        ]
        weights = [sum(sizes.weights(name) for name in each) for each in candidates.members]
        valued = self._valued(summed, weights)
        predicted, valued = (
            [[row[k] for k in kept] for row, kept in zip(rows, taken, strict=True)]
            for rows in (summed, valued)
        )
        if self.largest_kl is not None:
            chosen = candidates.within_loss(predicted, self.largest_kl)
        elif self.bits_per_weight is not None:
            chosen = candidates.within_bits(valued, sum(weights), self.bits_per_weight)
        else:
            assert self.budget_bytes is not None
            chosen = candidates.within_bytes(valued, sizes.total, self.budget_bytes, self._reserve)
        return chosen, sum(row[k] for row, k in zip(predicted, chosen, strict=True))

    def _valued(self, losses: list[list[float]], weights: list[int]) -> list[list[float]]:
        """The losses of sets as they count in the choice: layers shrunk towards each other, and less of them.

        What embedding and head lose is measured at every width, with all that depends on them, and stays.
        """
        count = len(losses) - bool(self._embedding_bits())
        layers, nearest = losses[:count], _nearest(self._choices(self._bits()))
        share = 1.0 if self.asymmetric == 0 else _LEFT
        shrunk = tempered(layers, [row[nearest] for row in layers], weights[:count], self.trust)
        return [*([share * loss for loss in row] for row in shrunk), *losses[count:]]

    @property
    def _reserve(self) -> int:
        if self.reserve_bytes is not None:
            return self.reserve_bytes
        return _RESERVED if self._layout.noted else 0

    def _taken_of(self, name: str, columns: int, formats: Sequence[Format]) -> None:
        """Refuse a layer that the runtime takes in none of the formats."""
        objections = [self._layout.objection(format, columns) for format in formats]
        if objections and all(objections):
            raise UserError(f"{self.name()}.runtime: {name} has rows of {columns}: {objections[0]}")

    def _label(self, format: Format) -> str:
        """What notes call a format, with its group where there are several of its kind."""
        alike = [other for other in self.writes() if other.kind == format.kind]
        if self.coded or len(alike) == 1:
            return format.label
        return f"{format.label} g{format.group}{'' if format.symmetric else ' asymmetric'}"

    def _formats(self, bits: int) -> tuple[Format, ...]:
        """The grids of a width."""
        if self.coded:
            return (Coded(rate=min(bits, _LARGEST_RATE), trellis=False),)
        return self._layout.formats(bits, self.group)

    def _measured(self, widths: tuple[Width, ...]) -> tuple[Format, ...]:
        """Where losses are measured: at the widths, or at the whole bits between, without a trellis."""
        if not self.coded:
            return tuple(format for bits in widths for format in self._formats(bits))
        low, high = (min(end, _LARGEST_RATE) for end in (min(widths), max(widths)))
        return tuple(Coded(rate=rate, trellis=False) for rate in range(low, high + 1))

    def _choices(self, widths: tuple[Width, ...]) -> tuple[Format, ...]:
        """What is chosen from: the widths, or coded rates between them."""
        found = self._measured(widths)
        if not self.coded:
            return found
        low, high = (int(end.nominal_bits * _PER_BIT) for end in (found[0], found[-1]))
        return tuple(Coded(rate=quarters / _PER_BIT) for quarters in range(low, high + 1))

    def _table_choices(self) -> tuple[Format, ...]:
        bits = self._embedding_bits()
        return self._choices(bits) if bits else ()

    def _for_choices(self, widths: tuple[Width, ...], losses: list[float]) -> list[float]:
        """The losses of all choices from those that were measured."""
        if not self.coded:
            return losses
        at, wanted = (
            [format.nominal_bits for format in formats]
            for formats in (self._measured(widths), self._choices(widths))
        )
        return extended(losses, at, wanted)


def _nearest(formats: tuple[Format, ...]) -> int:
    """Which of them is the nearest to the rate at which layers are compared."""
    return min(range(len(formats)), key=lambda k: abs(formats[k].nominal_bits - _COMPARED_AT))


def _offered(widths: Iterable[int]) -> tuple[Width, ...]:
    """As the type of the field."""
    known = set(widths)
    return tuple(width for width in get_args(Width) if width in known)
