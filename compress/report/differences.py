"""What stands between two runs and a comparison of their numbers.

Method: pure comparison of what the records say of evaluation text, window, base, protocol, machine
and versions. A difference makes the numbers it touches incomparable, and the page says so in words
before it shows them. It takes for granted that `machine` holds nothing that changes by the minute.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from compress.records.results import Result
from compress.records.run import RunRecord
from compress.report.rows import base_name
from compress.report.scores import score_name

_TOLD_APART = (
    "evaluation_sha256",
    "window",
    "windows",
    "stride",
)  # parts of a protocol with a line of their own


@dataclass(frozen=True)
class Difference:
    """What differs, and which numbers must not be compared because of it."""

    affects: Literal["quality", "speed", "both", "note"]
    text: str


def differences(runs: list[tuple[str, RunRecord, list[Result]]]) -> list[Difference]:
    """All differences among labelled runs; an empty list means their numbers compare."""
    found: list[Difference] = []
    if _distinct(run.data.evaluation_sha256 for _, run, _ in runs):
        values = "; ".join(f"{label}: {run.data.evaluation_sha256[:12] or 'none'}" for label, run, _ in runs)
        found.append(
            Difference(
                "quality", f"The evaluation data differ ({values}). Do not compare quality across runs."
            )
        )
    if _distinct(run.data.window for _, run, _ in runs):
        values = "; ".join(f"{label}: {run.data.window} tokens" for label, run, _ in runs)
        found.append(
            Difference("quality", f"The windows differ ({values}). Do not compare quality across runs.")
        )
    if _distinct(_base(run, results) for _, run, results in runs):
        scored = score_name(result for _, _, results in runs for result in results)
        against, alone = (
            (f"Δ {scored}, flips and KL", f"{scored} itself")
            if scored
            else ("Δ NLL, KL and top-1", "perplexity and bits per byte")
        )
        found.append(
            Difference(
                "quality",
                f"The bases differ. {against} are each against the run's own base: "
                f"do not compare them across runs; {alone} may be.",
            )
        )
    if _distinct(sorted({r.score_name or "" for r in results}) for _, _, results in runs):
        found.append(
            Difference("quality", "The runs are judged by different scores: do not compare quality.")
        )
    protocols = [_facts(result.protocol for result in results) for _, _, results in runs]
    if _distinct(protocols):
        found.append(
            Difference(
                "both", f"The protocols differ ({_keys(protocols)}). Do not compare numbers that they touch."
            )
        )
    machines = [_facts([run.machine, *(result.machine for result in results)]) for _, run, results in runs]
    if _distinct(machines):
        found.append(
            Difference(
                "speed",
                f"The machines differ ({_keys(machines)}). Do not compare speed or memory across runs.",
            )
        )
    versions = [_facts([run.versions, *(result.versions for result in results)]) for _, run, results in runs]
    if _distinct(versions):
        found.append(Difference("note", f"The software versions differ ({_keys(versions)})."))
    return found


def _base(run: RunRecord, results: list[Result]) -> str:
    """The base by what it measured like: the name alone would not tell two trainings apart."""
    name = base_name(run)
    fingerprints = sorted({variant.fingerprint for variant in run.variants if variant.name == name})
    measured = sorted({result.fingerprint for result in results if result.variant == name})
    return json.dumps([fingerprints or measured or run.base])


def _facts(parts: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Key -> the distinct values that any part gives it."""
    facts: dict[str, list[str]] = {}
    for part in parts:
        for key, value in part.items():
            text = json.dumps(value, sort_keys=True, default=str)
            if key not in _TOLD_APART and text not in facts.setdefault(key, []):
                facts[key].append(text)
    return {key: sorted(values) for key, values in facts.items()}


def _distinct(values: Iterable[object]) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1


def _keys(facts: list[dict[str, list[str]]]) -> str:
    keys = sorted({key for one in facts for key in one})
    return ", ".join(key for key in keys if _distinct(one.get(key) for one in facts))
