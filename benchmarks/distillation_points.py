"""Which students learn from whom, with which settings."""

from typing import Any

from pruning_points import Point

# half the parameters of the base that recipe `demo` trains, and of SmolLM2-135M
STUDENTS: dict[str, tuple[dict[str, Any], int]] = {
    "demo*": ({"blocks": 2, "intermediate": 352}, 400_000),
    "SmolLM2-135M*": ({"blocks": 11}, 100_000),
}
PRUNED: dict[str, Any] = {"prune_structured": {"target": {"parameters": 0.5}}}
# a start from nothing wants the rates of base training; weights that were trained want less
RATES: dict[str, dict[str, Any]] = {
    "demo*": {},
    "SmolLM2-135M*": {"window": 256, "batch": 4, "muon_learning_rate": 2e-3, "learning_rate": 3e-4},
}


def students(tool: str, setting: str, weights: str, learn: str, **fields: Any) -> list[Point]:
    """One setting, for every model's student, then the pass `learn`.

    `weights`: of the pass `student`; or pruned: all blocks of the teacher, narrower.
    """
    found = []
    for models, (shape, tokens) in STUDENTS.items():
        student = PRUNED if weights == "pruned" else {"student": shape | {"weights": weights}}
        passes = [student, {learn: RATES[models] | {"tokens": tokens} | fields}]
        found.append(Point(tool, setting, tokens, {"passes": passes}, True, 1, models))
    return found


def ours(setting: str, **fields: Any) -> list[Point]:
    """A student made of the teacher's weights, distilled."""
    return students("ours", setting, "teacher", "distill", **fields)


POINTS = [
    *students("alone", "random weights, text", "random", "train"),
    *students("fine_tuning", "the teacher's weights, text", "teacher", "train"),
    *students("ours", "random weights, forward KL", "random", "distill"),
    *ours("the teacher's weights, forward KL"),
    *ours("the teacher's weights, forward KL, no cross-entropy", cross_entropy=0),
    *ours("the teacher's weights, reverse KL", divergence="reverse_kl"),
    *ours("the teacher's weights, Jensen-Shannon", divergence="jensen_shannon"),
    *ours("the teacher's weights, skew KL", divergence="skew_kl"),
    *ours("the teacher's weights, forward KL, temperature 2", temperature=2),
    *ours("the teacher's weights, forward KL, hidden states", hidden=1.0),
    *ours("the teacher's weights, forward KL, relations", relations=1.0),
    *ours("the teacher's weights, forward KL, cached", targets="cached"),
    *students("ours", "pruned from the teacher, forward KL", "pruned", "distill"),
]
