"""The report's pure rules: fronts, verdicts, headlines, differences."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_records import bare, demo_run

from compress.records.records import Result
from compress.report import units
from compress.report.chains import chains
from compress.report.differences import differences
from compress.report.frontier import dominates, pareto_front
from compress.report.narrative import headlines
from compress.report.verdicts import Rate, State, change_of_nll, judge, quality_finding, speed_findings

coordinates = st.integers(-5, 5).map(float)
points = st.lists(st.tuples(coordinates, coordinates, coordinates), min_size=1, max_size=12)


@given(points)
def test_front_is_exactly_the_points_that_nothing_dominates(cloud: list[tuple[float, float, float]]) -> None:
    front = set(pareto_front(cloud))
    assert front
    for index, point in enumerate(cloud):
        assert (index in front) == (not any(dominates(other, point) for other in cloud))
        assert index in front or any(dominates(cloud[best], point) for best in front)


@given(points)
def test_front_does_not_depend_on_the_order(cloud: list[tuple[float, float, float]]) -> None:
    there = {cloud[index] for index in pareto_front(cloud)}
    back = cloud[::-1]
    assert there == {back[index] for index in pareto_front(back)}


@given(st.floats(1e-5, 1e9))
def test_rounding_keeps_three_digits(value: float) -> None:
    text = units.significant(value).replace(",", "")
    assert "e" not in text
    assert math.isclose(float(text), value, rel_tol=0.006) or abs(float(text) - value) <= 5.1e-6


def state(size: int, delta: float, half: float, rate: float) -> State:
    return State(
        size,
        3.0 + delta,
        delta,
        (delta - half, delta + half),
        decode={"torch": Rate(rate)},
        prefill={"torch": Rate(rate)},
    )


def test_same_bytes_and_same_speed_is_no_gain() -> None:
    verdict = judge(state(100, 0.0, 0.0, 300.0), state(100, 0.4, 0.02, 301.0))
    assert verdict.kind == "none"
    assert verdict.summary.startswith("No gain in size, speed or quality.")
    assert "Cost: quality worse by 0.400 nats (significant)." in verdict.summary
    assert "Same size; decode no faster, prefill no faster (PyTorch)." in verdict.summary


def test_an_interval_that_holds_zero_is_not_significant() -> None:
    verdict = judge(state(400, 0.0, 0.0, 300.0), state(100, 0.001, 0.002, 630.0))
    assert verdict.kind == "gain"
    assert "4.0× smaller" in verdict.summary
    assert "decode 2.1× faster" in verdict.summary
    assert "+0.00100 nats (not significant)" in verdict.summary
    assert "Cost" not in verdict.summary


def test_smaller_but_slower_tells_both() -> None:
    summary = judge(state(400, 0.0, 0.0, 300.0), state(100, 0.0, 0.0, 200.0)).summary
    assert "Gain: 4.0× smaller." in summary
    assert "Cost: decode 1.5× slower, prefill 1.5× slower (PyTorch)." in summary
    assert "Quality unchanged" in summary


@pytest.mark.parametrize(
    ("size", "told"), [(100, "Same size"), (101, "Same size"), (98, "smaller"), (103, "larger")]
)
def test_size_counts_above_one_percent(size: int, told: str) -> None:
    assert told in judge(State(bytes=100), State(bytes=size)).summary


def test_what_was_not_measured_is_said() -> None:
    assert judge(State(), State()).kind == "unknown"
    summary = judge(State(bytes=100), State(bytes=100)).summary
    assert summary.startswith("No gain in size.")
    assert "Speed not measured; quality not measured." in summary


def test_speeds_compare_only_within_a_runtime() -> None:
    found = speed_findings(State(decode={"torch": Rate(10.0)}), State(decode={"onnxruntime": Rate(99.0)}))
    assert [finding.direction for finding in found] == ["unknown"]


@pytest.mark.parametrize(("slowest", "direction"), [(0.01, "same"), (0.005, "gain"), (None, "gain")])
def test_a_step_is_faster_only_if_its_slowest_are(slowest: float | None, direction: str) -> None:
    before, after = State(decode={"torch": Rate(100.0, 0.01)}), State(decode={"torch": Rate(200.0, slowest)})
    assert [finding.direction for finding in speed_findings(before, after)] == [direction]


def test_change_adds_half_widths_in_quadrature() -> None:
    change, bounds = change_of_nll(state(1, 0.5, 0.03, 1.0), state(1, 0.1, 0.04, 1.0))
    assert change == pytest.approx(-0.4)
    assert bounds == pytest.approx((-0.45, -0.35))
    assert quality_finding(change, bounds).direction == "gain"


def test_a_quality_difference_without_interval_says_so() -> None:
    assert quality_finding(0.2, None).text.endswith("(no interval)")


def test_headline_has_the_numbers_of_the_best_tradeoffs_and_the_no_gains() -> None:
    run, results, _ = demo_run()
    sentences = headlines(run, results)
    texts = {sentence.kind: [s.text for s in sentences if s.kind == sentence.kind] for sentence in sentences}
    assert any(
        t.startswith("int4 in ONNX Runtime is 5.9× smaller and 2.1× faster at +0.0291 nats (significant")
        for t in texts["good"]
    )
    assert any(t.startswith("int8 in ONNX Runtime") and "not significant" in t for t in texts["good"])
    assert any(t.startswith("pruned: no gain in size or speed") for t in texts["none"])
    assert any("base beats the strongest reference, Kneser-Ney trigram" in t for t in texts["fact"])


def test_a_runtimes_speed_beats_no_variant_in_another_runtime() -> None:
    run, results, _ = demo_run()
    slow = [
        r.model_copy(update={"decode_tokens_per_second": 1.0}) if r.runtime == "torch" else r for r in results
    ]
    for sentence in headlines(run, slow):
        own, _, rival = sentence.text.partition("; but ")
        if rival:
            assert ("in ONNX Runtime" in own) == ("in ONNX Runtime" in rival), sentence.text


@pytest.mark.parametrize(("slowest", "gains"), [(0.01, False), (0.007, True)])
def test_speed_that_the_slowest_tokens_do_not_share_is_no_gain(slowest: float, gains: bool) -> None:
    run, results, _ = demo_run()
    rate = next(r.decode_tokens_per_second for r in results if (r.variant, r.runtime) == ("base", "torch"))
    changed = {
        "base": {"decode_seconds_p95": 0.01},
        "pruned": {"decode_tokens_per_second": 1.5 * (rate or 0), "decode_seconds_p95": slowest},
    }
    told = headlines(run, [r.model_copy(update=changed.get(r.variant, {})) for r in results])
    assert any(s.text.startswith("pruned: no gain in size or speed") for s in told) != gains


def test_headline_admits_a_base_worse_than_the_references() -> None:
    run, results, _ = demo_run()
    poor = [
        r.model_copy(update={"nll": 9.0, "perplexity": 8103.0}) if r.variant == "base" else r for r in results
    ]
    assert any("does NOT beat" in s.text and s.kind == "none" for s in headlines(run, poor))


def test_headline_of_nothing_measured() -> None:
    run, results, _ = demo_run()
    for sentence in headlines(run.model_copy(update={"references": []}), bare(results)):
        assert sentence.kind == "none"
        assert "neither size nor speed was measured" in sentence.text
    assert headlines(run.model_copy(update={"references": []}), []) == []


def test_chains_judge_every_step_against_the_one_before() -> None:
    run, results, _ = demo_run()
    told = {chain.variant: chain for chain in chains(run, results)}
    assert [step.name for step in told["student"].steps] == ["prune_layers", "distill"]
    pruned = told["pruned"].steps[0].verdict
    assert pruned is not None
    assert pruned.summary.startswith("No gain in size, speed or quality.")
    healed = told["healed"].steps[0].verdict
    assert healed is not None
    assert "Gain: quality better by 0.331 nats (significant)." in healed.summary
    total = told["healed"].total
    assert total is not None
    assert total.summary.startswith("No gain in size, speed or quality.")
    export = told["int4"].steps[-1].verdict
    assert export is not None
    assert "(ONNX Runtime against PyTorch)" in export.summary
    assert told["base"].steps[0].verdict is None
    assert told["base"].steps[0].notes[0][0] == "tokens per parameter"


def test_a_failed_factorisation_is_shown_as_a_warning() -> None:
    run, results, _ = demo_run()
    variant = next(v for v in run.variants if v.name == "int4")
    steps = [
        s.model_copy(update={"notes": {"failed_cholesky": ["layer.3"]}}) if "gptq" in s.name else s
        for s in variant.steps
    ]
    changed = [v.model_copy(update={"steps": steps}) if v is variant else v for v in run.variants]
    chain = next(
        c for c in chains(run.model_copy(update={"variants": changed}), results) if c.variant == "int4"
    )
    assert chain.steps[0].warnings == ("failed cholesky: layer.3",)


def changed_data(**fields: Any) -> Any:
    run, results, _ = demo_run()
    return run.model_copy(update={"data": run.data.model_copy(update=fields)}), results


def with_protocol(results: list[Result], **fields: Any) -> list[Result]:
    return [r.model_copy(update={"protocol": {**r.protocol, **fields}}) for r in results]


def test_equal_runs_have_no_differences() -> None:
    run, results, _ = demo_run()
    assert differences([("a", run, results), ("b", run, results)]) == []


def test_each_difference_names_what_it_forbids() -> None:
    run, results, _ = demo_run()
    cases = [
        (changed_data(evaluation_sha256="0" * 64), "quality", "evaluation data differ"),
        (changed_data(window=512), "quality", "windows differ"),
        ((run, with_protocol(results, threads=8)), "both", "protocols differ (threads)"),
        ((run.model_copy(update={"machine": {"cpu": "other"}}), results), "speed", "machines differ (cpu)"),
        (
            (run.model_copy(update={"versions": {"onnxruntime": "9"}}), results),
            "note",
            "versions differ (onnxruntime)",
        ),
    ]
    for (other, lines), affects, told in cases:
        found = differences([("a", run, results), ("b", other, lines)])
        assert [(d.affects, told in d.text) for d in found] == [(affects, True)]


def test_a_loaded_base_without_comparisons_of_its_own() -> None:
    """A base from elsewhere has no passes, and who measures it leaves its comparisons empty."""
    run, results, _ = demo_run()
    nothing = {
        "delta_nll": None,
        "delta_nll_ci95": None,
        "kl_to_base": None,
        "kl_ci95": None,
        "top1_agreement": None,
    }
    base = run.variants[0].model_copy(update={"steps": [], "fingerprint": "from-a-file"})
    int8 = next(v for v in run.variants if v.name == "int8")
    own = [step for step in int8.steps if step.name != "train"]
    own[0] = own[0].model_copy(update={"parent": "from-a-file"})
    loaded = run.model_copy(
        update={
            "base": "model.gguf",
            "variants": [base, int8.model_copy(update={"steps": own})],
            "step_results": [],
        }
    )
    lines = [
        r.model_copy(update=nothing) if (r.variant, r.runtime) == ("base", "torch") else r
        for r in results
        if r.variant in ("base", "int8")
    ]
    first, second = chains(loaded, lines)
    assert first.start == "as loaded from model.gguf"
    verdict = second.steps[0].verdict
    assert verdict is not None
    assert "3.6× smaller" in verdict.summary
    assert "+0.00040 nats (not significant)" in verdict.summary
