"""The report's pure rules: fronts, verdicts, headlines, chains, differences."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_records import Records, bare

from compress.records.manifest import PassRecord
from compress.records.results import Result
from compress.records.run import RunRecord
from compress.report import units
from compress.report.chains import Chain, chains
from compress.report.differences import differences
from compress.report.frontier import dominates, pareto_front
from compress.report.narrative import headlines
from compress.report.page import render
from compress.report.text import text_table
from compress.report.verdicts import (
    Rate,
    Snapshot,
    change_of_nll,
    judge,
    quality_finding,
    rate_finding,
    significance,
    size_finding,
    speed_findings,
)

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


def snapshot(size: int, delta: float, half: float, rate: float) -> Snapshot:
    return Snapshot(
        size,
        3.0 + delta,
        delta,
        (delta - half, delta + half),
        decode={"torch": paced(rate)},
        prefill={"torch": paced(rate)},
    )


def paced(rate: float, *rounds: float, session: str = "one") -> Rate:
    """A rate timed in five rounds, or in these, which take so many times as long."""
    return Rate(rate, tuple(x / rate for x in rounds or (1.0, 1.05, 0.96, 1.0, 1.02)), session)


def test_same_bytes_and_same_speed_is_no_gain() -> None:
    verdict = judge(snapshot(100, 0.0, 0.0, 300.0), snapshot(100, 0.4, 0.02, 301.0))
    assert verdict.kind == "none"
    assert verdict.summary.startswith("No gain in size, speed or quality.")
    assert "Cost: quality worse by 0.400 nats (significant)." in verdict.summary
    assert "Same size; decode no faster, prefill no faster (PyTorch)." in verdict.summary


def test_an_interval_that_holds_zero_is_not_significant() -> None:
    verdict = judge(snapshot(400, 0.0, 0.0, 300.0), snapshot(100, 0.001, 0.002, 630.0))
    assert verdict.kind == "gain"
    assert "4.0× smaller" in verdict.summary
    assert "decode 2.1× faster" in verdict.summary
    assert "+0.00100 nats (not significant)" in verdict.summary
    assert "Cost" not in verdict.summary


def test_smaller_but_slower_tells_both() -> None:
    summary = judge(snapshot(400, 0.0, 0.0, 300.0), snapshot(100, 0.0, 0.0, 200.0)).summary
    assert "Gain: 4.0× smaller." in summary
    assert "Cost: decode 1.5× slower, prefill 1.5× slower (PyTorch)." in summary
    assert "Quality unchanged" in summary


@pytest.mark.parametrize(
    ("size", "said"), [(100, "Same size"), (101, "Same size"), (98, "smaller"), (103, "larger")]
)
def test_size_counts_above_one_percent(size: int, said: str) -> None:
    assert said in judge(Snapshot(bytes=100), Snapshot(bytes=size)).summary


def test_what_was_not_measured_is_said() -> None:
    assert judge(Snapshot(), Snapshot()).kind == "unknown"
    summary = judge(Snapshot(bytes=100), Snapshot(bytes=100)).summary
    assert summary.startswith("No gain in size.")
    assert "Speed not measured; quality not measured." in summary


def test_speeds_compare_only_within_a_runtime() -> None:
    found = speed_findings(
        Snapshot(decode={"torch": paced(10.0)}), Snapshot(decode={"onnxruntime": paced(99.0)})
    )
    assert [finding.direction for finding in found] == ["unknown"]


@pytest.mark.parametrize(
    ("after", "direction", "text"),
    [
        (paced(200.0), "gain", "decode 2.0× faster"),
        (paced(50.0), "loss", "decode 2.0× slower"),
        (paced(115.0, 1, 1, 1), "same", "decode no faster"),
        (paced(200.0, 1, 1, 1, 1, 2.1), "same", "decode no faster"),  # one round was no faster
        (paced(200.0, session="another day"), "unknown", "decode not timed in turn"),
        (Rate(200.0), "unknown", "decode not timed in turn"),  # records from before there were rounds
    ],
)
def test_a_step_is_faster_only_if_it_is_in_every_round(after: Rate, direction: str, text: str) -> None:
    before = paced(100.0, *[1] * len(after.rounds))
    finding = rate_finding(before, after, "decode")
    assert (finding.direction, finding.text) == (direction, text)


def test_one_round_of_a_machine_that_changes_its_mind_gives_no_verdict() -> None:
    """A variant 3 times slower looked 3.6 times faster: the base had its turn beside another program."""
    finding = rate_finding(paced(10.0, 1.0), paced(36.0, 1.0), "decode")
    assert (finding.direction, finding.text) == ("unknown", "decode timed in too few rounds")


def test_change_adds_half_widths_in_quadrature() -> None:
    change, bounds = change_of_nll(snapshot(1, 0.5, 0.03, 1.0), snapshot(1, 0.1, 0.04, 1.0))
    assert change == pytest.approx(-0.4)
    assert bounds == pytest.approx((-0.45, -0.35))
    assert quality_finding(change, bounds).direction == "gain"


def test_a_quality_difference_without_interval_says_so() -> None:
    assert quality_finding(0.2, None).text.endswith("(no interval)")


def test_headline_has_the_numbers_of_the_best_tradeoffs_and_the_no_gains(records: Records) -> None:
    sentences = headlines(records.run, records.results)
    texts = {sentence.kind: [s.text for s in sentences if s.kind == sentence.kind] for sentence in sentences}
    base, int4 = records.result("base", "onnxruntime"), records.result("int4", "onnxruntime")
    assert base.disk_bytes
    assert int4.disk_bytes
    smaller = units.times(base.disk_bytes / int4.disk_bytes)
    cost = f"at {units.signed(int4.delta_nll)} nats ({significance(int4.delta_nll_ci95)}, "
    cost += f"KL {units.significant(int4.kl_to_base)})."
    assert [t for t in texts["good"] if t.startswith("int4")] == [
        f"int4 in ONNX Runtime is {smaller} smaller and 2.1× faster {cost}"
    ]
    (healed,) = [t for t in texts["none"] if t.startswith("healed")]
    assert healed.startswith("healed: no gain in size or speed (")
    assert "no faster than base in PyTorch)" in healed
    assert "ONNX Runtime alone, with base unchanged, against PyTorch: decode 3.0× faster, " in "".join(
        texts["fact"]
    )


@pytest.mark.parametrize(("nll", "verb", "kind"), [(0.01, "beats", "fact"), (9.0, "does NOT beat", "none")])
def test_headline_says_whether_the_base_beats_the_references(
    records: Records, nll: float, verb: str, kind: str
) -> None:
    strongest = min(records.run.references, key=lambda reference: reference.nll)
    results = [
        r.model_copy(update={"nll": nll, "perplexity": math.exp(nll)}) if r.variant == "base" else r
        for r in records.results
    ]
    (sentence,) = [s for s in headlines(records.run, results) if strongest.name in s.text]
    assert sentence.kind == kind
    assert f"base {verb} the strongest reference, {strongest.name}: perplexity" in sentence.text
    gap = units.significant(abs(strongest.nll - nll))
    assert sentence.text.endswith(f"({gap} nats {'better' if kind == 'fact' else 'worse'}).")


def test_a_runtimes_speed_beats_no_variant_in_another_runtime(records: Records) -> None:
    slow = [
        r.model_copy(update={"decode_tokens_per_second": 1.0}) if r.runtime == "torch" else r
        for r in records.results
    ]
    for sentence in headlines(records.run, slow):
        own, _, rival = sentence.text.partition("; but ")
        if rival:
            assert ("in ONNX Runtime" in own) == ("in ONNX Runtime" in rival), sentence.text


@pytest.mark.parametrize(("round_taken", "gains"), [(1.6, False), (1.4, True)])
def test_speed_that_a_round_does_not_share_is_no_gain(
    records: Records, round_taken: float, gains: bool
) -> None:
    rate = records.result("base").decode_tokens_per_second or 0.0
    rounds = [(1 / rate,) * 3, (1 / rate / 1.5, 1 / rate / 1.5, round_taken / rate / 1.5)]
    changed = {
        "base": {"decode_round_seconds": rounds[0]},
        "healed": {"decode_tokens_per_second": 1.5 * rate, "decode_round_seconds": rounds[1]},
    }
    lines = [r.model_copy(update=changed.get(r.variant, {})) for r in records.results]
    no_gains = [
        s for s in headlines(records.run, lines) if s.text.startswith("healed: no gain in size or speed")
    ]
    assert (not no_gains) == gains


def test_headline_of_nothing_measured(records: Records) -> None:
    run = records.run.model_copy(update={"references": []})
    for sentence in headlines(run, bare(records.results)):
        if sentence.kind != "fact":  # what a pass left out is known without measuring
            assert sentence.kind == "none"
            assert "neither size nor speed was measured" in sentence.text
    assert all(sentence.kind == "fact" for sentence in headlines(run, []))


def chain_of(run: RunRecord, results: list[Result], name: str) -> Chain:
    return next(chain for chain in chains(run, results) if chain.variant == name)


def words(chain: Chain, step: str) -> str:
    """The verdict on a step of a chain."""
    verdict = next(row.verdict for row in chain.steps if row.name == step)
    assert verdict is not None
    return verdict.summary


def test_every_step_is_judged_against_the_one_before(records: Records) -> None:
    pruned = next(r for r in records.run.step_results if r.pass_name == "prune_magnitude")
    healed = records.result("healed")
    assert pruned.delta_nll
    assert healed.delta_nll
    chain = chain_of(records.run, records.results, "healed")
    assert [step.name for step in chain.steps] == ["prune_magnitude", "distill"]
    assert f"quality worse by {units.significant(pruned.delta_nll)} nats" in words(chain, "prune_magnitude")
    won = pruned.delta_nll - healed.delta_nll
    assert f"Gain: quality better by {units.significant(won)} nats" in words(chain, "distill")
    base = chain_of(records.run, records.results, "base").steps
    assert [step.name for step in base] == ["create", "train", "export_onnx"]
    assert base[0].verdict is base[1].verdict is None
    assert base[1].notes[0][0] == "tokens per parameter"


def test_the_whole_way_from_the_base_is_judged_through_all_parents(records: Records) -> None:
    """A variant's record holds its own steps only: int4 has one that changes weights, its way three."""
    assert records.variant("int4").steps[0].name == "quantize_gptq"
    base, int4 = records.result("base"), records.result("int4")
    assert base.disk_bytes
    assert int4.disk_bytes
    assert int4.delta_nll
    total = chain_of(records.run, records.results, "int4").total
    assert total is not None
    assert f"{units.times(base.disk_bytes / int4.disk_bytes)} smaller" in total.summary
    assert f"by {units.significant(abs(int4.delta_nll))} nats" in total.summary
    assert "decode 2.1× faster, prefill 2.1× faster (ONNX Runtime)" in total.summary
    assert chain_of(records.run, records.results, "healed").total is not None
    assert chain_of(records.run, records.results, "base").total is None
    alone = records.variant("int4").model_copy(update={"parent": "base"})
    run = records.run.model_copy(update={"variants": [records.variant("base"), alone]})
    assert chain_of(run, records.results, "int4").total is None, "its one step says it already"


def test_an_export_is_judged_by_what_was_measured_of_it_alone(records: Records) -> None:
    torch, onnx = records.result("int4"), records.result("int4", "onnxruntime")
    assert torch.disk_bytes
    assert onnx.disk_bytes
    results = [r for r in records.results if "gguf" not in r.artifact]
    run = records.run.model_copy(update={"not_measured": {}})
    chain = chain_of(run, results, "int4")
    assert [step.name for step in chain.steps] == ["quantize_gptq", "export_onnx", "export_gguf"]
    said = words(chain, "export_onnx")
    assert "decode 7.9× faster, prefill 7.9× faster (ONNX Runtime against PyTorch)" in said
    assert f"Cost: {size_finding(torch.disk_bytes, onnx.disk_bytes).text}." in said
    assert words(chain, "export_gguf") == "Not measured after this step."
    why = records.run.model_copy(
        update={"not_measured": {"gguf": "not measured in llama.cpp: pip install x"}}
    )
    assert (
        words(chain_of(why, results, "int4"), "export_gguf")
        == "Written, not measured in llama.cpp: pip install x."
    )
    assert chain.steps[-1].size == units.ABSENT
    other = {"runtime": "llama.cpp", "artifact": "int4/gguf/model.gguf", "disk_bytes": 1}
    gguf = onnx.model_copy(update=other)
    said = words(chain_of(records.run, [*results, gguf], "int4"), "export_gguf")
    assert "(llama.cpp against PyTorch)" in said
    assert f"{units.times(torch.disk_bytes)} smaller" in said


def test_what_a_step_is_is_asked_of_its_kind(records: Records) -> None:
    """A third-party export may be called as it likes; and what is called an export need not be one."""
    renamed = {"export_onnx": "write_coreml", "quantize_gptq": "exporting"}
    int4 = records.variant("int4")
    steps = [s.model_copy(update={"name": renamed.get(s.name, s.name)}) for s in int4.steps]
    variants = [v.model_copy(update={"steps": steps}) if v is int4 else v for v in records.run.variants]
    run = records.run.model_copy(update={"variants": variants})
    before, after = (chain_of(r, records.results, "int4") for r in (records.run, run))
    assert [row.verdict for row in after.steps] == [row.verdict for row in before.steps]
    assert after.total == before.total


def test_records_from_before_kinds_are_read() -> None:
    old = {
        "name": "export_gguf", "config": {}, "seconds": 1.0, "peak_rss_bytes": None, "parent": None,
        "fingerprint": "f", "seed": 0, "notes": {},
    }  # fmt: skip
    record = PassRecord.model_validate(old)
    assert (record.kind, record.exports, record.changed) == ("export", ("gguf",), None)
    other = PassRecord.model_validate({**old, "name": "quantize_gptq"})
    assert (other.kind, other.is_export, other.exports) == (None, False, ())
    assert PassRecord.model_validate_json(record.model_dump_json()) == record


def test_settings_that_differ_from_the_defaults_stand_apart(records: Records) -> None:
    train = chain_of(records.run, records.results, "base").steps[1]
    assert train.changed == "tokens=8000, batch=16"
    assert ("clip", "1") in train.settings
    assert chain_of(records.run, records.results, "int4").steps[0].changed == "format=int4 (group=32)"
    assert chain_of(records.run, records.results, "healed").steps[0].changed == ""


def test_a_failed_factorisation_is_shown_as_a_warning(records: Records) -> None:
    variant = records.variant("int4")
    steps = [
        s.model_copy(update={"notes": {"failed_cholesky": ["layer.3"]}}) if "gptq" in s.name else s
        for s in variant.steps
    ]
    changed = [v.model_copy(update={"steps": steps}) if v is variant else v for v in records.run.variants]
    chain = chain_of(records.run.model_copy(update={"variants": changed}), records.results, "int4")
    assert chain.steps[0].warnings == ("failed cholesky: layer.3",)


def with_protocol(results: list[Result], **fields: Any) -> list[Result]:
    return [r.model_copy(update={"protocol": {**r.protocol, **fields}}) for r in results]


def test_equal_runs_have_no_differences(records: Records) -> None:
    assert differences([("a", records.run, records.results), ("b", records.run, records.results)]) == []


def test_each_difference_names_what_it_forbids(records: Records) -> None:
    run, results, _ = records

    def changed(part: str, **fields: Any) -> tuple[RunRecord, list[Result]]:
        old = getattr(run, part)
        new = {**old, **fields} if isinstance(old, dict) else old.model_copy(update=fields)
        return run.model_copy(update={part: new}), results

    cases = [
        (changed("data", evaluation_sha256="0" * 64), "quality", "evaluation data differ"),
        (changed("data", window=512), "quality", "windows differ"),
        ((run, with_protocol(results, threads=8)), "both", "protocols differ (threads)"),
        (changed("machine", cpu="other"), "speed", "machines differ (cpu)"),
        (changed("versions", onnxruntime="9"), "note", "versions differ (onnxruntime)"),
    ]
    for (other, lines), affects, said in cases:
        found = differences([("a", run, results), ("b", other, lines)])
        assert [(d.affects, said in d.text) for d in found] == [(affects, True)]


def test_a_loaded_base_without_comparisons_of_its_own(records: Records) -> None:
    """A base from elsewhere has no passes, and who measures it leaves its comparisons empty."""
    base = records.variant("base").model_copy(update={"steps": [], "fingerprint": "from-a-file"})
    int4 = records.variant("int4")
    own = [int4.steps[0].model_copy(update={"parent": "from-a-file"}), *int4.steps[1:]]
    loaded = records.run.model_copy(
        update={
            "base": "model.gguf",
            "variants": [base, int4.model_copy(update={"steps": own, "parent": "base"})],
            "step_results": [],
        }
    )
    assert records.result("base").delta_nll is None
    lines = [r for r in records.results if r.variant in ("base", "int4")]
    first, second = chains(loaded, lines)
    assert first.start == "as loaded from model.gguf"
    before, after = records.result("base"), records.result("int4")
    assert before.disk_bytes
    assert after.disk_bytes
    assert f"{units.times(before.disk_bytes / after.disk_bytes)} smaller" in words(second, "quantize_gptq")
    assert units.significant(abs(after.delta_nll or 0)) in words(second, "quantize_gptq")


def test_a_busy_machine_is_told_at_the_top(records: Records) -> None:
    def told(share: float | None) -> list[str]:
        lines = [r.model_copy(update={"busy_share": share}) for r in records.results]
        return [s.text for s in headlines(records.run, lines) if "Other programs" in s.text]

    assert told(None) == told(0.09) == []
    assert told(0.43)[0].startswith("Other programs used up to 43.0 % of the cores while speeds were timed")


def test_a_run_that_asks_for_it_has_it_beside_its_base(records: Records) -> None:
    references = records.run.references
    assert [r.name for r in references] == ["unigram", "Kneser-Ney trigram", "LSTM"]
    lstm, base = references[-1], records.variant("base").steps
    (trained,) = [step for step in base if step.curve()]
    assert lstm.tokens == trained.notes["tokens"]
    assert lstm.parameters == pytest.approx(records.result("base").parameters, rel=0.05)
    shown = [*render(*records), text_table(records.results, references)]
    assert [lstm.label in page for page in shown] == [True] * 3
