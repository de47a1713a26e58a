"""The steps inside chains, of which quality and size are told, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.artifact.folder import disk_bytes
from compress.measure.turns import Target
from compress.records.manifest import PassRecord
from compress.records.results import Result, StepResult
from compress.records.run import VariantRecord


@dataclass(frozen=True)
class InnerSteps:
    """The steps that change weights and are not the end of their chain.

    Attributes:
        steps: variant, index in its chain, step.
        ends: fingerprint -> variant, of the ends: the end of another chain is measured with that.
    """

    steps: tuple[tuple[str, int, PassRecord], ...]
    ends: Mapping[str, str]

    @classmethod
    def of(cls, variants: Sequence[VariantRecord]) -> InnerSteps:
        """Those of all variants but the base."""
        inner: list[tuple[str, int, PassRecord]] = []
        ends: dict[str, str] = {}
        for variant in variants:
            changing = [(i, s) for i, s in enumerate(variant.steps) if not s.is_export]
            if changing:
                ends.setdefault(changing[-1][1].fingerprint, variant.name)
            if variant.name != "base":
                inner += [(variant.name, i, s) for i, s in changing[:-1]]
        return cls(tuple(inner), ends)

    def targets(self, places: Mapping[str, Path]) -> list[Target]:
        """What is to be scored, each once; `places`: fingerprint -> folder."""
        found = dict.fromkeys(s.fingerprint for _, _, s in self.steps if s.fingerprint not in self.ends)
        return [Target(step, "torch", places[step], step) for step in found]

    def results(self, places: Mapping[str, Path], results: Sequence[Result]) -> list[StepResult]:
        """Quality and size after each, from the results of variants and steps."""
        scored = {r.variant: r for r in results if r.runtime == "torch"}
        return [
            StepResult(
                variant=name, step_index=index, pass_name=step.name,
                nll=result.nll,
                delta_nll=result.delta_nll,
                delta_nll_ci95=result.delta_nll_ci95,
                kl_to_base=result.kl_to_base,
                kl_ci95=result.kl_ci95,
                score=result.score,
                delta_score=result.delta_score,
                delta_score_ci95=result.delta_score_ci95,
                weight_bytes=result.weight_bytes,
                file_bytes=disk_bytes(places[step.fingerprint]),
            )
            for name, index, step in self.steps
            for result in [scored[self.ends.get(step.fingerprint, step.fingerprint)]]
        ]  # fmt: skip
