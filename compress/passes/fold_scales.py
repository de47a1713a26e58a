"""fold_scales: prepare a model for quantization without changing what it computes.

Input channels are scaled and the scales folded into the norm or layer before (layerwise/folding.py):
    awq          for few-bit weights: channels with large inputs get finer steps (solvers/awq.py)
    smoothquant  for 8-bit weights and activations: both share large channels (solvers/smoothquant.py)
A quantizer must follow; alone it makes nothing smaller. `quantize_round` gains by awq. A quantizer that
makes errors good itself (`quantize_gptq`) gains little if anything, and loses by scales as strong as plain
rounding likes: give it a weak beta (`betas: [0.125]`) and measure. Needs calibration text.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.calibration.magnitudes import InputStatistics, input_statistics
from compress.context import Context
from compress.errors import UserError
from compress.formats import AnyFormat, Int4
from compress.host.progress import track
from compress.layerwise.folding import Fold, Place, apply_fold, find_folds, shared, stacked_weight
from compress.passes.base import Kind, Need, Pass
from compress.solvers.awq import scales_for, search
from compress.solvers.smoothquant import smooth_scales

_TOLERANCE = 1e-3  # of the largest output; float32 rounding stays hundreds of times below


class FoldScales(Pass):
    """Scales of input channels, by AWQ or SmoothQuant."""

    kind: ClassVar[Kind] = "fold"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    method: Literal["awq", "smoothquant"] = Field("awq", description="how the scales are chosen")
    betas: tuple[float, ...] = Field(
        (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75),
        min_length=1,
        description="awq: exponents tried per layer; a single one is taken as it is",
    )
    format: AnyFormat = Field(Int4(), description="awq: the grid that betas are tried on")
    alpha: float = Field(0.5, ge=0, le=1, description="smoothquant: share of the difficulty put on weights")
    inputs: Literal["largest", "rms"] = Field(
        "largest",
        description="smoothquant: how large an input channel is: at most, for activations in fixed steps, or "
        "in root mean square, closer where every token has a step of its own",
    )
    places: tuple[Place, ...] = Field(
        ("attention_in", "attention_out", "mlp_in", "mlp_out"),
        min_length=1,
        description="which inputs to scale, where the architecture allows it",
    )
    samples: int = Field(512, ge=1, le=1 << 20, description="awq: input rows kept per layer to try betas on")
    batch: int = Field(4, ge=1, le=1024, description="calibration windows per forward pass")

    @field_validator("betas")
    @classmethod
    def _are_shares(cls, betas: tuple[float, ...]) -> tuple[float, ...]:
        for beta in betas:
            if not 0 <= beta <= 1:
                raise ValueError(f"{beta} is not between 0 (no scaling) and 1 (by the whole magnitude)")
        return betas

    def layers(self, model: nn.Module) -> list[str]:
        """Norms and linear layers that scales go into."""
        folds = find_folds(model, self.places)
        return list(dict.fromkeys(name for fold in folds for name in (fold.source, *fold.targets)))

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """One forward pass; the search on a few rows is small beside it."""
        return 2.0 * parameters * calibration_tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Fold. Scaled zeros are zeros, so masks hold. Notes tell the betas and the errors they were for.

        Raises:
            UserError: the model's output changed, so the architecture is not what its name says.
        """
        result = bundle.clone()
        model = result.model.to(context.device).eval()
        windows = torch.from_numpy(context.data.calibration.tokens).long()
        folds = find_folds(model, self.places)
        searching = self.method == "awq" and len(self.betas) > 1
        before = _outputs(model, windows[:1])
        seen = input_statistics(
            model,
            windows,
            [fold.targets[0] for fold in folds],
            samples=self.samples if searching else 0,
            batch=self.batch,
        )
        # all scales are chosen on the model as it was: folding one changes another's weights
        chosen: list[float] = []
        gains: list[float] = []
        with track(len(folds), f"{self.name()} {self.method}", "folds") as progress:
            scales = []
            for fold in folds:
                weight = stacked_weight(model, fold)
                if self.method == "smoothquant":
                    scales.append(self._smooth(model, fold, weight, seen.pop(fold.targets[0])))
                else:
                    s, beta, gain = self._activation_aware(model, fold, weight, seen.pop(fold.targets[0]))
                    scales.append(s)
                    chosen.append(beta)
                    gains.append(gain)
                progress.advance()
        for fold, s in zip(folds, scales, strict=True):
            apply_fold(model, fold, s)
        change = _relative_change(before, _outputs(model, windows[:1]))
        if not change <= _TOLERANCE:  # also when it is not a number
            raise UserError(
                f"fold_scales: folding changed the model's output by {change:.1%}; "
                f"this '{model.config.model_type}' is not built as expected; leave fold_scales out"
            )
        notes: dict[str, Any] = {"method": self.method, "folds": len(folds), "output_change": change}
        if chosen:
            notes["mean_beta"] = sum(chosen) / len(chosen)
        if searching:
            notes["mean_error_ratio"] = sum(gains) / len(gains)
        model.to("cpu")
        return result.evolve(notes=notes)

    def _activation_aware(
        self, model: Any, fold: Fold, weight: Tensor, seen: InputStatistics
    ) -> tuple[Tensor, float, float]:
        """Scales, their beta, and the output error relative to that of the first beta."""
        magnitudes = shared(model, fold, seen.mean, torch.mean)
        if len(self.betas) == 1:
            return scales_for(magnitudes, self.betas[0]), self.betas[0], 1.0
        beta, errors = search(weight, magnitudes, torch.cat(seen.sample), self._rounded, self.betas)
        first = max(errors[self.betas[0]], 1e-30)
        return scales_for(magnitudes, beta), beta, errors[beta] / first

    def _smooth(self, model: Any, fold: Fold, weight: Tensor, seen: InputStatistics) -> Tensor:
        size = seen.largest if self.inputs == "largest" else seen.rms
        inputs, weights = (shared(model, fold, x, torch.amax) for x in (size, weight.abs().amax(0)))
        return smooth_scales(inputs, weights, self.alpha)

    def _rounded(self, weight: Tensor) -> Tensor:
        grid = self.format.fit(weight)
        return self.format.values(self.format.round(weight, grid), grid)


@torch.no_grad()
def _outputs(model: Any, windows: Tensor) -> Tensor:
    output: Tensor = model(windows.to(model.get_input_embeddings().weight.device))[0]
    return output.float()


def _relative_change(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
