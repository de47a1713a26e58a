"""The pictures of loss curves: what each pass that trained was asked to minimise, and the held-out loss.

Method: a pass of the kind "train" minimises the cross-entropy of its text, in nats per token as the held-out
NLL is: one picture holds both. One that learns labels minimises the loss of the right label; what is held out
is that, too, or one minus the score that it stops by. Any other minimises what its settings make of a
teacher's distribution, temperatures and weights. Two quantities have two pictures, since on one axis two
units look like overfitting.

Limits: a long curve is thinned to `_POINTS` points, the last one among them.
"""

from collections.abc import Iterable
from typing import NamedTuple

from compress.records.manifest import CurvePoint, PassRecord
from compress.report import units
from compress.report.pictures import COLOURS, Curve, Picture, Series
from compress.report.scales import linear_scale, thousands

_POINTS = 120
_SAME_UNIT = "loss on training text, and held-out NLL (nats per token)"
_OBJECTIVE = "what the pass minimises (a unit of its own)"
_HELDOUT = "held-out NLL (nats per token)"
_OF_LABELS = "loss of the right label on training text"
_LOST_SCORE = "1 − score on held-out text"
_LABELS_BOTH = "loss of the right label, on training and on held-out text"


class _Titles(NamedTuple):
    """What stands beside the axis: `both` where one picture holds the objective and the held-out loss."""

    both: str
    objective: str
    heldout: str


Line = list[tuple[float, float]]  # (tokens, value)


def loss_pictures(steps: Iterable[tuple[str, PassRecord]]) -> list[tuple[str, Picture]]:
    """(pass, picture) of every pass that left a loss curve; each curve is labelled by its variant."""
    kinds: dict[tuple[str, _Titles], list[tuple[str, PassRecord]]] = {}
    for label, step in steps:
        if len(step.curve()) > 1:
            kinds.setdefault((step.name, _titles(step)), []).append((label, step))
    pictures = []
    for (name, titles), labelled in kinds.items():
        objective = [(label, _thinned(_objective(step.curve()))) for label, step in labelled]
        heldout = [(label, _thinned(_heldout(step))) for label, step in labelled]
        if titles.both:
            pictures.append((name, _picture(titles.both, objective, heldout)))
            continue
        pictures.append((name, _picture(titles.objective, objective, [])))
        if any(line for _, line in heldout):
            pictures.append((name, _picture(titles.heldout, [], heldout)))
    return pictures


def _titles(step: PassRecord) -> _Titles:
    judged_by = step.notes.get("stop_by")
    if judged_by == "score":
        return _Titles("", _OF_LABELS, _LOST_SCORE)
    if judged_by == "loss":
        return _Titles(_LABELS_BOTH, "", "")
    return _Titles(_SAME_UNIT if step.kind == "train" else "", _OBJECTIVE, _HELDOUT)


def _objective(curve: list[CurvePoint]) -> Line:
    return [(point.tokens, point.objective) for point in curve]


def _heldout(step: PassRecord) -> Line:
    scored = [(point.tokens, point.heldout) for point in step.curve() if point.heldout is not None]
    before = step.notes.get("heldout_before")
    return [(0.0, float(before)), *scored] if isinstance(before, int | float) else scored


def _thinned(line: Line) -> Line:
    every = -(-len(line) // _POINTS) or 1
    kept = line[::every]
    return kept if not line or kept[-1] == line[-1] else [*kept, line[-1]]


def _picture(title: str, objective: list[tuple[str, Line]], heldout: list[tuple[str, Line]]) -> Picture:
    lines = [line for _, line in (*objective, *heldout) if line]
    x = linear_scale([0.0, max(line[-1][0] for line in lines)], room=0.02, write=thousands)
    y = linear_scale([value for line in lines for _, value in line])
    series: list[Series] = []
    hover: list[tuple[float, float, int, list[str]]] = []
    for dashed, suffix, labelled in ((False, "", objective), (True, ", held out", heldout)):
        for number, (label, line) in enumerate(labelled):
            if not line:
                continue
            name = label + (suffix if objective and heldout else "")
            spots = tuple((x.share(tokens), 1 - y.share(value)) for tokens, value in line)
            hover += [
                (*spot, len(series), [name, f"{units.significant(value, 4)} at {units.count(tokens)} tokens"])
                for spot, (tokens, value) in zip(spots, line, strict=True)
            ]
            series.append(Series(name, number % COLOURS, curve=Curve(spots, dashed)))
    return Picture(x, y, "tokens seen", title, tuple(series), hover=tuple(hover))
