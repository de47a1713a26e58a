"""Page, Markdown and tables of runs that are judged by labels, from the records of real tiny runs."""

import math
import re
from pathlib import Path
from typing import Any

import label_records
import pytest
from label_records import HOSTILE
from report_records import Records, timed
from test_report_page import Page, book_of, heights, spots

from compress.records.flips import Flip
from compress.records.results import Result
from compress.report import compare, render, units
from compress.report.chains import chains
from compress.report.curves import loss_pictures
from compress.report.differences import differences
from compress.report.flips import changed, labelled_facts
from compress.report.narrative import headlines
from compress.report.plots import runtime_points, tradeoff_pictures
from compress.report.text import text_table
from compress.report.verdicts import Snapshot, change_of_score, judge, score_finding


@pytest.fixture(scope="module")
def topics(labelled_runs: Path) -> Records:
    return label_records.load(labelled_runs, "topics")


@pytest.fixture(scope="module")
def words(labelled_runs: Path) -> Records:
    return label_records.load(labelled_runs, "words")


def cells(html: str) -> list[list[str]]:
    """The rows of the results table: of each cell all its text."""
    table = html[html.index('<table id="results"') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.DOTALL)
    return [
        [
            " ".join(re.sub(r"<[^>]+>", " ", cell).split())
            for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)
        ]
        for row in rows
    ]


def test_the_table_has_the_score_and_no_column_of_dashes(topics: Records) -> None:
    html = render(*topics)[0]
    _, headings, *rows = cells(html)
    assert "Accuracy %" in headings
    assert "Δ accuracy points" in headings
    for gone in ("Perplexity", "Bits/byte", "Decode tokens/s", "Per token ms", "Top-1 %", "1 − cosine"):
        assert gone not in headings
    rows = [row for row in rows if len(row) == len(headings)]
    for number, heading in enumerate(headings):
        assert any(row[number] != units.ABSENT for row in rows), heading
    line = topics.result("small", "onnxruntime")
    (row,) = [row for row in rows if row[:2] == ["small", "ONNX Runtime"]]
    shown = dict(zip(headings, row, strict=True))
    assert line.score is not None
    assert line.score_ci95 is not None
    low, high = line.score_ci95
    score = units.significant(100 * line.score)
    assert shown["Accuracy %"] == f"{score} {units.interval((100 * low, 100 * high))}"
    assert line.metrics is not None
    for key, title in (
        ("macro_f1", "Macro F1 %"), ("matthews", "Matthews × 100"),
        ("calibration_error", "Calibration error %"),
    ):  # fmt: skip
        assert shown[title] == units.significant(100 * line.metrics[key])
    assert line.flips is not None
    assert shown["Flips %"].startswith(units.significant(100 * line.flips))
    assert ("not significant" in shown["Δ accuracy points"]) == contains_zero(line)
    (reference,) = [row for row in rows if row[0] == "TF-IDF and logistic regression"]
    assert reference[headings.index("Accuracy %")].startswith(
        units.significant(100 * topics.run.label_references[1].score)
    )


def contains_zero(line: Result) -> bool:
    assert line.delta_score_ci95 is not None
    low, high = line.delta_score_ci95
    return low <= 0 <= high


def test_markdown_has_it_too(topics: Records) -> None:
    markdown = render(*topics)[1]
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(bars) == 1
    assert len(table) == 2 + len(topics.results) + len(topics.run.label_references)
    assert "Accuracy, %" in table[0]
    assert "Perplexity" not in table[0]
    assert "Decode" not in table[0]
    line = topics.result("small")
    (row,) = [row for row in table if row.startswith("| small | PyTorch")]
    assert f"| {units.signed(100 * (line.delta_score or 0))}" in row
    assert "decisions changed" in markdown
    assert "script" not in markdown, "texts stay on the page"


def test_the_table_at_the_end_of_a_run(topics: Records, labelled_runs: Path) -> None:
    told = (labelled_runs / "topics.out").read_text(encoding="utf-8")
    table = text_table(topics.results, [], topics.run.label_references)
    assert told.startswith(table)
    heading, *lines = table.splitlines()
    assert re.split(r"  +", heading) == [
        "variant", "runtime", "accuracy, %", "Δ points [95 %]", "flips, %", "KL, nats", "prefill, tokens/s",
        "MB", "peak MB",
    ]  # fmt: skip
    small = topics.result("small", "onnxruntime")
    assert small.delta_score_ci95 is not None
    low, high = small.delta_score_ci95
    assert small.delta_score is not None
    assert small.score is not None
    assert small.flips is not None
    (line,) = [line for line in lines if line.startswith("small") and "onnxruntime" in line]
    assert re.split(r"  +", line)[2:5] == [
        f"{100 * small.score:.2f}",
        f"{100 * small.delta_score:+.2f} [{100 * low:+z.2f}, {100 * high:+z.2f}]",
        f"{100 * small.flips:.2f}",
    ]
    assert lines[-1].startswith("TF-IDF and logistic regression")
    assert f"{100 * topics.run.label_references[1].score:.2f}" in lines[-1]


def test_a_table_of_text_keeps_its_columns(records: Records) -> None:
    heading = text_table(records.results, records.run.references).splitlines()[0]
    assert re.split(r"  +", heading)[2:] == [
        "MB", "perplexity", "Δ NLL, nats", "KL, nats", "top-1", "prefill, tokens/s", "decode, tokens/s",
        "peak MB",
    ]  # fmt: skip


def test_headlines_speak_of_the_score(topics: Records) -> None:
    lines = [timed(r, 900.0 if r.runtime == "onnxruntime" else 300.0) for r in topics.results]
    lines = [
        r.model_copy(update={"decode_tokens_per_second": None, "decode_round_seconds": ()}) for r in lines
    ]
    fast = [
        timed(r, 2000.0).model_copy(update={"decode_tokens_per_second": None, "decode_round_seconds": ()})
        if (r.variant, r.runtime) == ("small", "onnxruntime")
        else r
        for r in lines
    ]
    told = [sentence.text for sentence in headlines(topics.run, fast)]
    small = topics.result("small", "onnxruntime")
    word = "not significant" if contains_zero(small) else "significant"
    (sentence,) = [text for text in told if text.startswith("small in ONNX Runtime")]
    assert (
        f"and 2.2× faster at {units.signed(100 * (small.delta_score or 0))} points of accuracy ({word}, "
        in sentence
    )
    assert f"flips {units.percent(small.flips)})" in sentence
    assert not any("nats" in text or "perplexity" in text for text in told)
    best = max(row.score for row in topics.run.label_references)
    base = topics.result("base").score or 0.0
    (reference,) = [text for text in told if "strongest reference" in text]
    assert ("base beats" in reference) == (base > best)
    assert f"{units.significant(abs(100 * (base - best)))} points" in reference


def test_chains_tell_the_score_of_each_step(topics: Records) -> None:
    (chain,) = [chain for chain in chains(topics.run, topics.results) if chain.variant == "small"]
    pruned, rounded, exported = chain.steps
    (step,) = topics.run.step_results
    small = topics.result("small")
    assert pruned.quality == units.significant(100 * (step.score or 0))
    assert pruned.change == units.signed(100 * (step.delta_score or 0))
    assert rounded.quality == units.significant(100 * (small.score or 0))
    change = (small.delta_score or 0) - (step.delta_score or 0)
    assert rounded.change == units.signed(100 * change)
    for shown in (pruned, rounded, exported):
        assert shown.verdict is not None
        assert "accuracy" in shown.verdict.summary.lower()
        assert "nats" not in shown.verdict.summary
    assert chain.total is not None
    assert "accuracy" in chain.total.summary.lower()
    html = render(*topics)[0]
    assert "Change: accuracy after the step minus before it." in html


@pytest.mark.parametrize(
    ("change", "bounds", "direction", "text"),
    [
        (-0.02, (-0.03, -0.01), "loss", "accuracy worse by 2.00 points (significant)"),
        (0.02, (0.01, 0.03), "gain", "accuracy better by 2.00 points (significant)"),
        (-0.02, (-0.05, 0.0), "same", "accuracy −2.00 points (not significant)"),
        (-0.02, None, "loss", "accuracy worse by 2.00 points (no interval)"),
        (0.0, (0.0, 0.0), "same", "accuracy unchanged"),
        (None, None, "unknown", "accuracy not measured"),
    ],
)
def test_a_fall_of_the_score_is_a_loss(change: Any, bounds: Any, direction: str, text: str) -> None:
    found = score_finding("accuracy", change, bounds)
    assert (found.direction, found.text) == (direction, text)


def test_scores_decide_where_they_were_measured_and_add_in_quadrature() -> None:
    before = Snapshot(nll=1.0, delta_nll=0.0, score_name="accuracy", score=0.9, delta_score=-0.05,
                      delta_score_ci=(-0.08, -0.02))  # fmt: skip
    after = Snapshot(nll=2.0, delta_nll=1.0, score_name="accuracy", score=0.93, delta_score=-0.02,
                     delta_score_ci=(-0.06, 0.02))  # fmt: skip
    change, bounds = change_of_score(before, after)
    assert change == pytest.approx(0.03)
    assert bounds == pytest.approx((0.03 - math.hypot(0.04, 0.03), 0.03 + math.hypot(0.04, 0.03)))
    assert "accuracy +3.00 points (not significant)" in judge(before, after).summary.lower()


def test_pictures_are_of_what_was_lost(topics: Records) -> None:
    html = render(*topics)[0]
    pictures = tradeoff_pictures(runtime_points(topics.results))
    picture = pictures["disk/score/log"]
    assert picture is not None
    assert picture.y_title == "accuracy lost (points)"
    for number, (_, y) in spots(picture).items():
        lost = -100 * (topics.results[number].delta_score or 0.0)
        if topics.results[number].delta_score is not None:
            assert picture.y.low + y * (picture.y.high - picture.y.low) == pytest.approx(lost)
    first = re.findall(r'<div class="plot" data-plot="(\w+)">(.*?)</figure>', html, re.DOTALL)
    assert [key for key, _ in first] == ["size", "speed"]
    assert all('aria-label="accuracy lost (points) against' in drawn for _, drawn in first)
    assert "against prefill (tokens/s)" in first[1][1], "nothing was decoded"
    assert 'value="decode"' not in html
    told = [line for point in book_of(html)["lines"] for line in point]
    assert any(line.startswith("accuracy ") for line in told)
    assert not any("perplexity" in line or "decode" in line for line in told)


def test_the_held_out_score_has_a_picture_of_its_own(topics: Records) -> None:
    step = topics.variant("base").steps[1]
    own, heldout = [picture for _, picture in loss_pictures([("base", step)])]
    assert own.y_title == "loss of the right label on training text"
    assert heldout.y_title == "1 − score on held-out text"
    scored = [point.heldout for point in step.curve() if point.heldout is not None]
    assert heights(heldout, "base") == pytest.approx([step.notes["heldout_before"], *scored])
    by_loss = step.model_copy(update={"notes": {**step.notes, "stop_by": "loss"}})
    (both,) = [picture for _, picture in loss_pictures([("base", by_loss)])]
    assert both.y_title.startswith("loss of the right label")


def test_what_changed_is_told_and_escaped(topics: Records) -> None:
    html = render(*topics)[0]
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.tags) == 2, "the packed pictures, ours"
    assert "<script>alert" not in html
    (shown,) = changed(topics.run)
    assert (shown.variant, shown.runtime) == ("small", "ONNX Runtime")
    (record,) = [f for f in topics.run.flips if (f.variant, f.runtime) == ("small", "onnxruntime")]
    assert record.worst
    for flip in record.worst:
        assert flip.text.endswith(HOSTILE)
        assert flip.text in page.text
        assert f"{flip.now} ({units.percent(flip.confidence_now)})" in page.text
    for change, effect in shown.changes:
        assert (effect == "lost") == (change.before == change.label)
        assert (effect == "gained") == (change.now == change.label)
    assert f"{record.changed:,} of 60 decisions changed" in page.text


def test_a_word_is_marked_in_its_sentence(words: Records) -> None:
    base = words.run.flips[0]
    flip = Flip(
        text=f"a <b> {HOSTILE} c", word=(2, 5), label="O", before="O", now="B-card", confidence_before=0.9,
        confidence_now=0.8,
    )  # fmt: skip
    found = base.model_copy(update={"variant": "small", "worst": [flip], "lost": 1})
    html = render(words.run.model_copy(update={"flips": [found]}), words.results, words.recipe)[0]
    assert "a <mark>&lt;b&gt;</mark> &lt;script&gt;" in html
    _, headings, *_ = cells(html)
    assert "Span F1 %" in headings
    assert "Span precision %" in headings
    assert "Δ span F1 points" in headings
    assert words.run.label_references[0].score_name == "span_f1"
    told = [s.text for s in headlines(words.run, words.results) if "reference" in s.text]
    assert "most frequent label of each word: span F1" in told[0]


def test_where_the_rows_came_from_is_said(topics: Records) -> None:
    page = Page(render(*topics)[0])
    for text in ("300 to train on", "210 to train on, 30 held out, 60 to judge by", "texts cut off"):
        assert text in page.text
    told = dict(
        labelled_facts({
            "read": {"train": 9, "heldout": 0, "evaluation": 4}, "left_out": {"empty texts": 2},
            "split": {"heldout": "cut", "evaluation": "given"},
            "duplicates": {"same": 3, "near": 1, "other_labels": 2},
            "overlaps": {"evaluation": {"with": ["train"], "same": 1, "near": 2}}, "cut_off": {"train": 5},
            "longest": 512,
        })
    )  # fmt: skip
    assert told["rows read"] == "9 to train on, 4 to judge by"
    assert told["rows left out"] == "2 empty texts"
    assert told["how they were divided"] == (
        "held out: cut off what was read, each label in its share; to judge by: given"
    )
    assert "2 texts have several labels" in told["near duplicates"]
    assert told["in evaluation and other parts"] == "1 texts the same, 2 nearly: scores on them flatter"
    assert told["texts cut off"] == "5 to train on (longer than 512 tokens)"
    assert labelled_facts(None) == []


def test_definitions_are_those_of_what_was_measured(topics: Records, records: Records) -> None:
    labels, text = (Page(render(*each)[0]).text for each in (topics, records))
    for name in ("calibration error", "−ln p(right label)"):
        assert name in labels
        assert name not in text
    assert "exp(NLL), per token" not in labels
    assert "predicted tokens; the first token" not in labels


def test_runs_of_different_scores_do_not_compare(topics: Records, words: Records) -> None:
    page = Page(compare([topics, words]))
    assert "judged by different scores" in page.text
    other = topics.run.model_copy(
        update={"variants": [v.model_copy(update={"fingerprint": "x"}) for v in topics.run.variants]}
    )
    (found,) = differences([("a", topics.run, topics.results), ("b", other, topics.results)])
    assert "Δ accuracy, flips and KL are each against the run's own base" in found.text
