"""What each pass of each chain cost and gained.

Method: every fingerprint that was measured, be it a step or a finished variant, becomes a `Snapshot`;
a step is judged against the state its `parent` fingerprint names. A variant's record holds its own steps,
so shared prefixes are reported once, with the variant that owns them; the whole way from the base is put
together through the variants' parents. A step that ends a variant also has that variant's speed. An export
step changes no weights: it is judged by what was measured of the folder that it wrote, against the torch
artifact, and by nothing where no runtime measured that folder.
"""

from dataclasses import dataclass, replace
from typing import Any

from compress.records.manifest import PassRecord
from compress.records.results import Result
from compress.records.run import RunRecord, VariantRecord
from compress.report import units
from compress.report.rows import base_name, with_base_as_zero
from compress.report.scores import hundredths, interval_hundredths
from compress.report.verdicts import (
    Finding,
    Snapshot,
    Verdict,
    change_of_nll,
    change_of_score,
    judge,
    runtime_name,
    significance,
    snapshot_of,
)

_LONGEST_NOTE = 160
_WARNING_PREFIXES = ("failed", "warning", "raised")


@dataclass(frozen=True)
class ChainStep:
    """One row of a chain's table: all text, ready to print.

    `changed` are the settings that differ from the pass's defaults, as far as the record tells; `settings`
    are all. `quality` is the score where labels are judged, in hundredths, else the NLL in nats; `change` is
    in the same unit.
    """

    number: int
    name: str
    changed: str
    settings: tuple[tuple[str, str], ...]
    size: str
    quality: str
    change: str
    change_interval: str
    change_word: str
    kl: str
    seconds: str
    peak: str
    verdict: Verdict | None
    notes: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """A variant's own steps, what they start from, and the whole way from the base where that is longer."""

    variant: str
    start: str
    steps: tuple[ChainStep, ...]
    total: Verdict | None


def chains(run: RunRecord, results: list[Result]) -> list[Chain]:
    """A chain per variant, in the recipe's order, each without the steps its parent already has."""
    by_name = {variant.name: variant for variant in run.variants}
    ways = {variant.name: _way(variant, by_name) for variant in run.variants}
    snapshots = _snapshots(run, results, ways)
    reported: list[Chain] = []
    for variant in run.variants:
        parent = by_name.get(variant.parent or "")
        inherited = {step.fingerprint for step in parent.steps} if parent else set()
        own = [(index, step) for index, step in enumerate(variant.steps) if step.fingerprint not in inherited]
        start = f"continues {parent.name}" if parent else ("starts here" if own else "as loaded")
        if not parent and variant.name == base_name(run) and not own:
            start = f"as loaded from {run.base}" if run.base != variant.name else "as loaded"
        start_of = parent or by_name.get(base_name(run))
        previous = _end(ways[start_of.name], start_of) if start_of and start_of is not variant else None
        steps = []
        for index, step in own:
            before = snapshots.get(step.parent or "") or snapshots.get(previous or "")
            steps.append(_step(run, results, variant, index, step, before, snapshots.get(step.fingerprint)))
            previous = step.fingerprint
        reported.append(
            Chain(variant.name, start, tuple(steps), _total(run, by_name, variant, ways, snapshots))
        )
    return reported


Ways = dict[str, list[PassRecord]]  # variant -> the steps that made its weights, from the first


def _way(variant: VariantRecord, by_name: dict[str, VariantRecord]) -> list[PassRecord]:
    """The steps that made a variant's weights, those of its parents first."""
    line = [variant]
    while (parent := by_name.get(line[-1].parent or "")) is not None and parent not in line:
        line.append(parent)
    steps = {step.fingerprint: step for owner in reversed(line) for step in owner.steps if not step.is_export}
    return list(steps.values())


def _end(way: list[PassRecord], variant: VariantRecord) -> str:
    """The fingerprint after the last step that changed weights, which is where speeds are filed."""
    return way[-1].fingerprint if way else variant.fingerprint


def _total(
    run: RunRecord,
    by_name: dict[str, VariantRecord],
    variant: VariantRecord,
    ways: Ways,
    snapshots: dict[str, Snapshot],
) -> Verdict | None:
    """The finished variant against the base; None where a single step already says it."""
    base = by_name.get(base_name(run))
    if base is None or base is variant:
        return None
    shared = {step.fingerprint for step in ways[base.name]}
    beyond = [step for step in ways[variant.name] if step.fingerprint not in shared]
    before, after = (
        snapshots.get(_end(ways[base.name], base)),
        snapshots.get(_end(ways[variant.name], variant)),
    )
    return judge(before, after) if len(beyond) > 1 and before is not None and after is not None else None


def _snapshots(run: RunRecord, results: list[Result], ways: Ways) -> dict[str, Snapshot]:
    """Fingerprint -> what was measured there."""
    snapshots: dict[str, Snapshot] = {}
    score_name = next((result.score_name for result in results if result.score_name), "")
    by_name = {variant.name: variant for variant in run.variants}
    for result in with_base_as_zero(run, results):
        variant = by_name.get(result.variant)
        if variant is None:
            continue
        snapshot = snapshot_of(result)
        for fingerprint in {_end(ways[variant.name], variant), variant.fingerprint}:
            known = snapshots.get(fingerprint)
            if known is None:
                snapshots[fingerprint] = snapshot
            else:
                first = snapshot if result.runtime == "torch" else known
                snapshots[fingerprint] = replace(
                    first,
                    decode={**known.decode, **snapshot.decode},
                    prefill={**known.prefill, **snapshot.prefill},
                )
    for measured in run.step_results:
        owner = by_name.get(measured.variant)
        if owner is None or measured.step_index >= len(owner.steps):
            continue
        fingerprint = owner.steps[measured.step_index].fingerprint
        known = snapshots.get(fingerprint, Snapshot())
        compared = measured.delta_nll is not None  # the base's own step has no comparison of its own
        snapshots[fingerprint] = replace(
            known,
            bytes=measured.file_bytes or measured.weight_bytes or known.bytes,
            nll=known.nll if measured.nll is None else measured.nll,
            delta_nll=measured.delta_nll if compared else known.delta_nll,
            delta_ci=measured.delta_nll_ci95 if compared else known.delta_ci,
            kl=measured.kl_to_base if compared else known.kl,
            score_name=score_name if measured.score is not None else known.score_name,
            score=known.score if measured.score is None else measured.score,
            delta_score=known.delta_score if measured.delta_score is None else measured.delta_score,
            delta_score_ci=(
                known.delta_score_ci if measured.delta_score is None else measured.delta_score_ci95
            ),
        )
    return snapshots


def _step(
    run: RunRecord,
    results: list[Result],
    variant: VariantRecord,
    index: int,
    step: PassRecord,
    before: Snapshot | None,
    after: Snapshot | None,
) -> ChainStep:
    if step.is_export:
        before, after = _export_snapshots(results, variant, step)
    verdict = None if before is None else judge(before, after or Snapshot())
    if step.is_export and after is None:
        verdict = _unmeasured(run, step) or verdict
    shown = after or Snapshot()
    quality, change, bounds = shown.nll, *(change_of_nll(before, after) if before and after else (None, None))
    if shown.score is not None:
        quality = hundredths(shown.score)
        change, bounds = change_of_score(before, shown) if before else (None, None)
    notes, warnings = _notes(step.notes)
    tokens = _tokens_per_parameter(run, results, variant, step)
    if tokens:
        said = "tokens per parameter"
        notes = ((said, tokens), *(note for note in notes if note[0] != said))
    return ChainStep(
        number=index + 1,
        name=step.name,
        changed=", ".join(f"{key}={_compact(value)}" for key, value in (step.changed or {}).items()),
        settings=tuple((key, _compact(value)) for key, value in step.config.items()),
        size=units.size(shown.bytes),
        quality=units.significant(quality),
        change=units.signed(change if shown.score is None else hundredths(change)),
        change_interval=units.interval(
            bounds if shown.score is None else interval_hundredths(bounds), with_sign=True
        ),
        change_word=significance(bounds),
        kl=units.significant(shown.kl),
        seconds=units.duration(step.seconds),
        peak=units.size(step.peak_rss_bytes),
        verdict=verdict,
        notes=notes,
        warnings=warnings,
    )


def _unmeasured(run: RunRecord, step: PassRecord) -> Verdict | None:
    """Why nothing was measured of what a step wrote, where the record says it."""
    reasons = [f"Written, {run.not_measured[name]}." for name in step.exports if name in run.not_measured]
    return Verdict("unknown", (Finding("unknown", " ".join(reasons)),)) if reasons else None


def _export_snapshots(
    results: list[Result], variant: VariantRecord, step: PassRecord
) -> tuple[Snapshot, Snapshot | None]:
    """The torch artifact and what the step wrote, their speeds under one key so that they compare."""
    own = [result for result in results if result.variant == variant.name]
    torch = next((result for result in own if result.runtime == "torch"), None)
    folders = [f"{variant.artifact}/{name}" for name in step.exports]
    written = next(
        (r for r in own if any(f"{r.artifact}/".startswith(f"{folder}/") for folder in folders)), None
    )
    if torch is None or written is None:
        return Snapshot(), None
    key = f"{runtime_name(written.runtime)} against PyTorch"
    return snapshot_of(torch, key), snapshot_of(written, key)


def _tokens_per_parameter(
    run: RunRecord, results: list[Result], variant: VariantRecord, step: PassRecord
) -> str:
    """Training tokens over parameters of the variant, for steps that trained."""
    curve = step.curve()
    parameters = next((r.parameters for r in results if r.variant == variant.name and r.parameters), None)
    if not curve or not parameters:
        return ""
    seen = curve[-1].tokens
    corpus = run.data.train_tokens
    passes = f", {units.significant(seen / corpus, 2)} passes over the text" if corpus else ""
    return f"{units.significant(seen / parameters)} ({units.count(seen)} tokens{passes})"


def _notes(notes: dict[str, Any]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """A pass's own words: ordinary ones, and those that tell of a failure."""
    ordinary = []
    warnings = []
    for key, value in _flat(notes):
        name = key.replace("_", " ")
        if key in ("loss_curve", "average_curve") or value in (None, [], {}):
            continue
        text = _compact(value)
        if key.startswith(_WARNING_PREFIXES):
            warnings.append(f"{name}: {text}")
        else:
            ordinary.append((name, text))
    return tuple(ordinary), tuple(warnings)


def _flat(notes: dict[str, Any]) -> list[tuple[str, Any]]:
    """Notes whose dictionaries are spread into one entry per key; formats and short ones stay whole."""
    spread: list[tuple[str, Any]] = []
    for key, value in notes.items():
        if isinstance(value, dict) and "kind" not in value and len(_compact(value)) >= _LONGEST_NOTE // 2:
            spread += [(f"{key} {inner}", held) for inner, held in _flat(value)]
        else:
            spread.append((key, value))
    return spread


def _compact(value: object) -> str:
    """A setting or note in one short line."""
    if value is None or value in ([], {}, ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict) and "kind" in value:
        rest = _compact({key: inner for key, inner in value.items() if key != "kind"})
        text = f"{value['kind']} ({rest})" if rest else str(value["kind"])
    elif isinstance(value, dict):
        text = " ".join(f"{key}={_compact(inner)}" for key, inner in value.items() if inner is not None)
    elif isinstance(value, list | tuple):
        text = ", ".join(_compact(inner) for inner in value)
    else:
        text = str(value)
    return text if len(text) <= _LONGEST_NOTE else text[: _LONGEST_NOTE - 1] + "…"
