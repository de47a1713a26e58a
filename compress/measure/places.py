"""What of a run, or of an artifact, is measured, and where: in torch, and in the runtimes of its exports."""

from collections.abc import Sequence
from pathlib import Path

from compress.measure.turns import Target
from compress.records.run import VariantRecord
from compress.runtimes.exported import EXPORTED


def exports_in(artifact: Path) -> list[Path]:
    """What lies in an artifact for other runtimes that are installed."""
    places = [artifact / name / export.file for name, export in EXPORTED.items() if export.installed]
    return [place for place in places if place.exists()]


def targets_of(folder: Path, variant: VariantRecord) -> list[Target]:
    """A variant in torch, and each of its exports in the runtime that it is for, where that is installed."""
    places = [("torch", variant.artifact)]
    for name in variant.exports:
        if (export := EXPORTED.get(name)) is not None and export.installed:
            places.append((export.runtime, "/".join(filter(None, (variant.artifact, name, export.file)))))
    return [
        Target(variant.name, runtime, folder / artifact, variant.fingerprint, artifact)
        for runtime, artifact in places
    ]


def not_measured(variants: Sequence[VariantRecord]) -> dict[str, str]:
    """Why, of each kind of export that no runtime here can open."""
    found = {name: EXPORTED.get(name) for variant in variants for name in variant.exports}
    reasons = {name: "not measured: no runtime of ours opens it" for name, e in found.items() if e is None}
    return reasons | {
        name: f"not measured in {export.runtime}: pip install {export.package}"
        for name, export in found.items()
        if export is not None and not export.installed
    }
