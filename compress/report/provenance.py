"""Where the numbers come from: data and hashes, machine, protocol, definitions, samples.

Method: facts are (name, value) pairs ready to print. Machine and protocol are dictionaries whose keys
belong to whoever measured; they are shown as they come, and where two lines of one run disagree both
values are shown, since nothing may be hidden by a merge.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compress.records.results import Result
from compress.records.run import RunRecord
from compress.report import units
from compress.report.rows import base_name
from compress.report.scores import metric_name
from compress.report.verdicts import runtime_name

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Written:
    """What a variant wrote after a prompt, and in which runtimes it wrote just that."""

    variant: str
    runtimes: str
    text: str


def facts(run: RunRecord, results: list[Result]) -> Facts:
    """The text that was used, with hashes, and tokens per parameter of the base."""
    data = run.data
    name = base_name(run)
    parameters = next((r.parameters for r in results if r.variant == name and r.parameters), None)
    found = [
        ("source", data.source),
        ("train", _part(data.train_tokens, data.train_sha256)),
        ("calibration", _part(data.calibration_tokens, data.calibration_sha256)),
        ("evaluation", _part(data.evaluation_tokens, data.evaluation_sha256, data.evaluation_bytes)),
        ("window", f"{data.window} tokens"),
        ("base", f"{run.base}, {units.count(parameters)} parameters" if parameters else run.base),
    ]
    if parameters and data.train_tokens:
        found.append(
            ("train text per parameter", f"{units.significant(data.train_tokens / parameters)} tokens")
        )
    return found


def machine_facts(run: RunRecord, results: list[Result]) -> Facts:
    """Machine, then versions, of the run and of every measured line."""
    machine = _merge([run.machine, *(result.machine for result in results)])
    versions = _merge([run.versions, *(result.versions for result in results)])
    return machine + versions


def protocol_facts(results: list[Result]) -> Facts:
    """How it was measured, merged over the lines."""
    return _merge(
        # what labels are averaged over stands among the definitions
        {key: value for key, value in r.protocol.items() if key != "normaliser" or r.score is None}
        for r in results
    )


def definitions(results: list[Result]) -> Facts:
    """One definition each, as the measuring code holds them: of text, of labels, and of both."""
    scored = any(result.score is not None for result in results)
    written = any(result.score_name == _WRITTEN for result in results)
    labels = any(result.score is not None and result.score_name != _WRITTEN for result in results)
    texts = not scored or any(
        result.perplexity is not None and result.score_name != _WRITTEN for result in results
    )
    of_scores = (_of_labels(results) if labels else []) + (_OF_WRITTEN if written else [])
    return (_OF_TEXT if texts else []) + of_scores + _OF_ALL


_OF_TEXT = [
    (
        "NLL",
        "mean over predicted tokens, in nats; windows do not overlap, nor is their first token predicted",
    ),
    ("perplexity", "exp(NLL), per token: not comparable across tokenizers"),
    ("bits per byte", "total nats / (ln 2 × bytes of the text): comparable across tokenizers"),
    ("Δ NLL", "NLL minus the base's on the same tokens; positive is worse"),
    ("KL to base", "mean over positions of KL(p_base ‖ p_variant), from full-vocabulary logits"),
    ("top-1", "share of positions where variant and base have the same most likely token"),
]
_OF_ALL = [
    (
        "intervals",
        "95 %, paired block bootstrap over windows or labelled texts; “not significant” where one holds 0",
    ),
    (
        "change by a step",
        "Δ NLL or Δ score after minus before; its interval adds the two half-widths in quadrature",
    ),
    (
        "ratio, faster, smaller",
        "against the base in the same runtime; size counts above 1 %, speed above 20 %",
    ),
    ("prefill, decode", "timed apart after warm-up, variants interleaved; p50 and p95 over repetitions"),
    (
        "memory",
        "never mixed: bytes on disk, bytes of weights resident, peak RSS of a fresh process",
    ),
    (
        "Pareto front",
        "the lines that no other line beats in both quantities of the picture, by point estimate",
    ),
    ("units", "1 MB = 10⁶ bytes; – means not measured"),
]

_WRITTEN = "rouge_l"  # the score of those that write texts of labelled sources
_OF_WRITTEN = [
    (
        "texts",
        "written greedily of each source, in the runtime, up to the end or measure.answer_tokens; compared "
        "with the target",
    ),
    ("ROUGE-L", "mean F1 of the longest common subsequence of words; ROUGE-1 and -2: of words, of pairs"),
    ("chrF, BLEU", "over all texts, as sacrebleu defines them"),
    ("exact match", "share of texts that are their target, but for white space"),
    ("Δ score", "minus the base’s on the same sources, in points of 0.01; negative is worse"),
    (
        "flips",
        "share of texts that are not the base’s; lost: the base’s was the target, this is not; gained: the "
        "reverse",
    ),
    ("NLL", "mean over the targets’ tokens, each from the source and the target before it, in nats"),
    ("KL to base", "mean over the targets’ tokens of KL(p_base ‖ p_variant), from full-vocabulary logits"),
]
_SCORES = {
    "accuracy": "share of decisions that are right",
    "micro_f1": "2 TP / (2 TP + FP + FN) over all labels of all texts; a label holds from 0.5 on",
    "span_f1": "2 TP / (spans found + spans that are there), each right as a whole or not",
    "spearman": "rank correlation of the numbers with those that are right, × 100",
}


def _of_labels(results: list[Result]) -> Facts:
    names = dict.fromkeys(result.score_name for result in results if result.score_name)
    return [
        *((metric_name(name), _SCORES[name]) for name in names if name in _SCORES),
        ("Δ score", "minus the base’s on the same texts, in points of 0.01; negative is worse"),
        (
            "flips",
            "share of decisions that are not the base’s; lost: right before, wrong now; gained: the reverse",
        ),
        (
            "calibration error",
            "over 15 bins of confidence, the share right minus the mean confidence, weighted; 0 is best",
        ),
        ("NLL", "mean over texts or words of −ln p(right label), in nats; of numbers half the squared error"),
        ("KL to base", "mean over decisions of KL(p_base ‖ p_variant) of the labels’ probabilities"),
    ]


def samples_by_prompt(run: RunRecord) -> list[tuple[str, list[Written]]]:
    """Prompt -> what each variant wrote, without the prompt; runtimes that wrote the same share one entry."""
    grouped: dict[str, dict[tuple[str, str], list[str]]] = {}
    for sample in run.samples:
        text = sample.text.removeprefix(sample.prompt)
        runtimes = grouped.setdefault(sample.prompt, {}).setdefault((sample.variant, text), [])
        runtimes.append(runtime_name(sample.runtime))
    return [
        (prompt, [Written(variant, ", ".join(names), text) for (variant, text), names in written.items()])
        for prompt, written in grouped.items()
    ]


def _part(tokens: int, sha256: str, size: int | None = None) -> str:
    parts = [f"{units.count(tokens)} tokens ({tokens:,})"]
    if size:
        parts.append(units.size(size))
    if sha256:
        parts.append(f"sha256 {sha256}")
    return ", ".join(parts)


def _merge(parts: Iterable[dict[str, Any]]) -> Facts:
    """Key -> all distinct values, in order of appearance."""
    merged: dict[str, list[str]] = {}
    for part in parts:
        for key, value in part.items():
            text = _plain(key, value)
            if text not in merged.setdefault(key, []):
                merged[key].append(text)
    # the unit stands beside the number
    names = {key: key.removesuffix("_bytes").replace("_", " ") for key in merged}
    return [(names[key], " · ".join(values)) for key, values in merged.items()]


def _plain(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if key.endswith("bytes"):
            return units.size(float(value))
        return str(value)
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)
