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

`budget_bytes` counts every file of the artifact's folder: codes, scales, header, configuration, tokenizer,
manifest, but not exports inside it. The folder is never larger; it is smaller by less than one more bit
somewhere takes, and by text that is weighed at its longest (artifact/sizes.py): one or two kilobytes, and
some ten bytes per tensor. `reserve_bytes` are left besides for what later passes of a chain add to the
manifest. Needs calibration text; its last windows serve to measure, the others to fit.
"""

import json
import textwrap
import time
from collections import Counter
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.artifact.sizes import ArtifactBytes
from compress.context import Context
from compress.formats import Coded, Format, Int8
from compress.formats.registry import format_from
from compress.formats.swap import embedding_names, quantize_embeddings
from compress.layerwise.budget import Assignment, Candidates
from compress.layerwise.quantize import LayerSolver, quantize_sequentially
from compress.layerwise.sensitivity import Probe, embedding_losses, layer_losses
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass
from compress.records.manifest import changed_settings
from compress.solvers.losses import extended, tempered

Width = Literal[2, 3, 4, 5, 6, 8]
_MEASURED_BITS = 3  # losses there stand far above the noise of bfloat16
_COMPARED_AT = 3  # bits at which tensors' levels are compared
# Of the layers' summed loss, what is left when each makes good what those before it lost: on SmolLM2-135M the
# whole model's KL was 0.51 to 0.64 of the sum, from 3.3 to 5.5 bits, with the embeddings' loss in both.
_LEFT = 0.5
_PER_BIT = 4  # coded rates to choose from
_LARGEST_RATE = 7
# Bytes, more than a manifest has of this pass beside its configuration: the record, and a line for a width.
_NOTED, _LABELLED = 1024, 40


class QuantizeAuto(Pass, LayerSolver):
    """Widths per layer by measured loss and an exact knapsack, then GPTQ with the asymmetric target."""

    kind: ClassVar[Kind] = "quantize"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    budget_bytes: int | None = Field(None, ge=1, description="of the whole artifact, every file")
    bits_per_weight: float | None = Field(
        None, gt=0, le=9, description="of linear layers and embeddings, scales and zero-points included"
    )
    largest_kl: float | None = Field(None, gt=0, description="sum of the layers' predicted losses, in nats")
    widths: tuple[Width, ...] = Field(
        (2, 3, 4, 5, 6, 8), min_length=1, description="bits that a linear layer may get"
    )
    embedding_widths: tuple[Width, ...] = Field(
        (4, 5, 6, 8), min_length=1, description="bits that embedding and head may get"
    )
    coded: bool = Field(
        False, description="entropy-code all codes: fewer bytes in the file, a byte per weight in memory"
    )
    trust: float = Field(
        0.5, ge=0, le=1, description="how far measured losses decide between layers; 0: all alike; 1: alone"
    )
    group: int = Field(64, ge=16, description="columns that share a scale below 8 bits; at 8 the row does")
    select: tuple[str, ...] = Field(
        ("*",), min_length=1, description="wildcards of the linear layers to take"
    )
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave float")
    measured_windows: int = Field(4, ge=1, description="of the calibration windows, to measure losses on")
    measured_tokens: int = Field(256, ge=8, description="of each of them")
    moment_windows: int = Field(8, ge=1, description="of the others, for the errors of single layers")
    reserve_bytes: int = Field(4096, ge=0, description="of the budget, for what later passes note")

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = ("budget_bytes", "bits_per_weight", "largest_kl")
        given = [name for name in goals if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(goals)}; given: {', '.join(given) or 'none'}")
        return self

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers, then embedding and head."""
        self.check_outputs(model)
        linears = linear_layers(model, self.select, self.skip)
        return linears + (embedding_names(model) if linears else [])

    def writes(self) -> tuple[Format, ...]:
        """All formats that it chooses from."""
        return tuple(dict.fromkeys((*self._choices(self.widths), *self._choices(self.embedding_widths))))

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """As quantize_gptq, and a forward pass from each layer on over the tokens measured."""
        measured = 2.0 * parameters * self.measured_windows * self.measured_tokens
        solving = (4.0 + 6.0) * parameters * calibration_tokens + self.flops_of_outputs(parameters)
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
        tables = embedding_names(model)
        started = time.monotonic()
        losses = self._measure(bundle, model, names, windows, context)
        seconds = time.monotonic() - started
        stated = json.dumps([self.model_dump(mode="json"), changed_settings(self)], indent=2)
        config = textwrap.indent(stated, " " * 8)  # as it will stand in the manifest
        noted = len(config.encode()) + _NOTED + _LABELLED * len(self.writes())
        sizes = ArtifactBytes(bundle, [*names, *tables], noted, context.workdir / "weighed")
        plan, predicted = self._plan(names, tables, losses, sizes)
        notes: dict[str, Any] = {
            "layers": dict(sorted(Counter(plan[name].label for name in names).items())),
            "embeddings": plan[tables[0]].label,
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
        quantize_embeddings(model, plan[tables[0]])
        solved["raised_damping"] = len(solved["raised_damping"])
        model.to("cpu")
        return result.evolve(notes={**notes, **solved})

    def _measure(
        self, bundle: Bundle, model: nn.Module, names: list[str], windows: Tensor, context: Context
    ) -> list[list[float]]:
        """Losses per tensor and width: the layers', then those of embedding and head together."""
        heldout = min(self.measured_windows, max(len(windows) - 1, 1))
        fitted = windows[:-heldout][: self.moment_windows] if len(windows) > heldout else windows
        probe = Probe(model, windows[-heldout:, : self.measured_tokens], context.precision)
        tables = embedding_losses(model, self._measured(self.embedding_widths), probe)
        found = layer_losses(
            model,
            names,
            self._measured(self.widths),
            self._format(_MEASURED_BITS),
            probe,
            fitted,
            masks=bundle.masks,
            damping=self.damping,
            batch=self.batch,
            precision=context.precision,
        )
        return [
            *(self._for_choices(self.widths, found[name]) for name in names),
            self._for_choices(self.embedding_widths, tables),
        ]

    def _plan(
        self, names: list[str], tables: list[str], losses: list[list[float]], sizes: ArtifactBytes
    ) -> tuple[Assignment, float]:
        """A format for every layer and for the embeddings, and the summed loss predicted for them."""
        size = sizes.share if self.bits_per_weight is None else sizes.stored
        formats = [self._choices(self.widths)] * len(names) + [self._choices(self.embedding_widths)]
        members = [*([name] for name in names), tables]  # of what gets one format
        costs = [
            [sum(size(name, format) for name in together) for format in each]
            for together, each in zip(members, formats, strict=True)
        ]
        candidates = Candidates(members, formats, costs)
        weights = [sum(sizes.weights(name) for name in together) for together in members]
        if self.largest_kl is not None:
            chosen = candidates.within_loss(losses, self.largest_kl)
        else:
            valued = self._valued(losses, formats[0], weights)
            if self.bits_per_weight is not None:
                chosen = candidates.within_bits(valued, sum(weights), self.bits_per_weight)
            else:
                assert self.budget_bytes is not None
                rest = sizes.rest + self.reserve_bytes
                chosen = candidates.within_bytes(valued, rest, self.budget_bytes)
        return candidates.plan(chosen), sum(row[k] for row, k in zip(losses, chosen, strict=True))

    def _valued(
        self, losses: list[list[float]], formats: tuple[Format, ...], weights: list[int]
    ) -> list[list[float]]:
        """The losses as they count in the choice: layers shrunk towards each other, and less of them."""
        *layers, embeddings = losses
        levels = [row[_nearest(formats)] for row in layers]
        share = 1.0 if self.asymmetric == 0 else _LEFT
        shrunk = tempered(layers, levels, weights[:-1], self.trust)
        # what embedding and head lose is measured at every width, with all that depends on them
        return [*([share * loss for loss in row] for row in shrunk), embeddings]

    def _format(self, bits: int) -> Format:
        if self.coded:
            return Coded(rate=min(bits, _LARGEST_RATE), trellis=False)
        return Int8() if bits == 8 else format_from({"kind": f"int{bits}", "group": self.group})

    def _measured(self, widths: tuple[Width, ...]) -> tuple[Format, ...]:
        """Where losses are measured: at the widths, or at the whole bits between, without a trellis."""
        if not self.coded:
            return tuple(self._format(b) for b in widths)
        low, high = (min(end, _LARGEST_RATE) for end in (min(widths), max(widths)))
        return tuple(Coded(rate=rate, trellis=False) for rate in range(low, high + 1))

    def _choices(self, widths: tuple[Width, ...]) -> tuple[Format, ...]:
        """What is chosen from: the widths, or coded rates between them."""
        found = self._measured(widths)
        if not self.coded:
            return found
        low, high = (int(end.nominal_bits * _PER_BIT) for end in (found[0], found[-1]))
        return tuple(Coded(rate=quarters / _PER_BIT) for quarters in range(low, high + 1))

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
