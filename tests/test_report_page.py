"""The rendered page and its Markdown, without a browser."""

import base64
import gzip
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from report_records import Records, bare

from compress.records.results import Result
from compress.report import compare, render, units
from compress.report.curves import loss_pictures
from compress.report.page import MOST_BYTES
from compress.report.pictures import Picture
from compress.report.plots import runtime_points, tradeoff_pictures

HOSTILE = "<script>alert('x')</script>|`*\"&"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data


def book_of(html: str) -> dict[str, Any]:
    """What the page's script unpacks."""
    match = re.search(r'<script type="text/plain" id="book">(.*?)</script>', html, re.DOTALL)
    assert match
    book: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(match[1])))
    return book


def hostile(records: Records) -> Records:
    """The same run with names, notes, prompts and texts that are code."""
    variants = [
        v.model_copy(
            update={
                "name": HOSTILE,
                "steps": [
                    s.model_copy(update={"notes": {HOSTILE: HOSTILE}, "changed": {HOSTILE: HOSTILE}})
                    for s in v.steps
                ],
            }
        )
        if v.name == "int4"
        else v
        for v in records.run.variants
    ]
    samples = [
        s.model_copy(update={"variant": HOSTILE, "prompt": HOSTILE, "text": HOSTILE * 2})
        for s in records.run.samples
    ]
    more = {
        "recipe_name": HOSTILE,
        "variants": variants,
        "samples": samples,
        "machine": {HOSTILE: HOSTILE},
        "versions": {"x": HOSTILE},
    }
    results = [
        r.model_copy(update={"variant": HOSTILE}) if r.variant == "int4" else r for r in records.results
    ]
    return Records(records.run.model_copy(update=more), results, records.recipe + HOSTILE)


@pytest.fixture(scope="module")
def page(records: Records) -> Page:
    return Page(render(*records)[0])


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "img", "base"), tag
        for name in ("src", "href", "srcset", "data", "action"):
            # a picture's marker is drawn elsewhere in the page
            assert name not in attributes or (attributes[name] or "").startswith("#mark-"), (tag, attributes)
    policy = next(
        a["content"]
        for t, a in page.tags
        if t == "meta" and "Content-Security" in (a.get("http-equiv") or "")
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_every_column_sorts_by_keyboard_and_says_its_state(page: Page) -> None:
    headings = [a for t, a in page.tags if t == "th" and "data-key" in a]
    assert len(headings) == 16
    assert all(heading["aria-sort"] == "none" for heading in headings)
    assert sum(t == "button" and "data-series" not in a for t, a in page.tags) == len(headings)


def test_the_page_holds_what_a_reader_needs(page: Page, records: Records) -> None:
    run = records.run
    needed = [run.data.evaluation_sha256, str(run.machine["cpu"]), run.versions["torch"], records.recipe]
    for text in (*needed, "Kneser-Ney trigram", "No gain", "significant", "tokens per parameter"):
        assert text in page.text


def test_the_first_pictures_need_no_script(page: Page, records: Records) -> None:
    html = render(*records)[0]
    drawn = re.findall(r'<div class="plot[^>]*data-plot="([^"]*)">(.*?)</figure>', html, re.DOTALL)
    assert [key for key, _ in drawn] == ["size", "speed", "loss/0", "loss/1", "loss/2"]
    for key, picture in drawn[:2]:
        assert picture.count('<use href="#mark-0" x="50%"') == 1  # in the legend
        assert len(re.findall(r'<use href="#mark-\d" x="(?!50%)', picture)) == len(records.results), key
        assert ">int4</text>" in picture
    assert all('class="curve' in picture for _, picture in drawn[2:])
    assert "html:not(.ready) .picks { display: none; }" in html, "what only a script can serve is not shown"


def test_settings_are_folded_away_but_those_that_were_changed(records: Records) -> None:
    html = render(*records)[0]
    train = html[html.index('<span class="pass">train</span>') :]
    open_part, folded = train[: train.index("<details>")], train[train.index("<details>") :]
    assert "tokens=8000, batch=16" in open_part
    for folded_name in ("learning_rate", "momentum", "clip"):
        assert folded_name not in open_part
        assert f"<dt>{folded_name}</dt>" in folded


def test_hostile_names_stay_text(records: Records) -> None:
    html, markdown = render(*hostile(records))
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.tags) == 2  # the packed pictures, ours
    assert HOSTILE in page.text
    assert "<script>alert" not in html
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    book = book_of(html)
    for picture in book["pictures"].values():  # what the page puts in as HTML; all else it puts in as text
        assert "<script>" not in picture["html"]
    assert any("&lt;script&gt;" in picture["html"] for picture in book["pictures"].values())
    compared = compare([hostile(records), hostile(records)])
    assert sum(tag == "script" for tag, _ in Page(compared).tags) == 2


def test_absent_numbers_are_dashes_and_nothing_breaks(records: Records) -> None:
    run, results, recipe = records
    empty = run.model_copy(update={"step_results": [], "samples": [], "references": []})
    html, markdown = render(empty, bare(results), recipe)
    page = Page(html)
    assert "None" not in page.text
    assert not re.search(r"\bnan\b", page.text)
    assert "–" in page.text
    assert "None" not in markdown
    assert page.text.count("Not measured in this run.") == 2
    assert all(picture is None for key, picture in book_of(html)["pictures"].items() if "loss" not in key)


def test_without_latency_the_size_picture_remains(records: Records) -> None:
    untimed = [
        r.model_copy(
            update={name: None for name in Result.model_fields if "seconds" in name or "per_second" in name}
        )
        for r in records.results
    ]
    pictures = book_of(render(records.run, untimed, records.recipe)[0])["pictures"]
    assert pictures["decode/kl/log"] is None
    assert pictures["disk/kl/log"] is not None


def test_one_variant_only(records: Records) -> None:
    run, _, recipe = records
    alone = run.model_copy(update={"variants": run.variants[:1], "step_results": [], "references": []})
    html, markdown = render(alone, [records.result("base")], recipe)
    assert "Nothing to compare yet" in html
    assert "| base | PyTorch |" in markdown
    render(alone.model_copy(update={"variants": []}), [], "")


def test_markdown_tables_are_valid(records: Records) -> None:
    for run, results, recipe in (records, hostile(records)):
        markdown = render(run, results, recipe)[1]
        table = [line for line in markdown.splitlines() if line.startswith("|")]
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in table]
        assert len(table) == 2 + len(results) + len(run.references)
        assert set(bars) == {12}
        assert re.fullmatch(r"(\| :?-+:? )+\|", table[1])
        assert run.data.evaluation_sha256 in markdown


def spots(picture: Picture | None) -> dict[int, tuple[float, float]]:
    """Number of the point -> its place, from the bottom left."""
    assert picture is not None
    return {number: (x, 1 - y) for x, y, _, number in picture.hover if isinstance(number, int)}


def test_points_lie_where_their_numbers_are(records: Records) -> None:
    pictures = tradeoff_pictures(runtime_points(records.results))
    assert len(pictures) == 5 * 3 * 2
    picture = pictures["disk/nll/linear"]
    assert picture is not None
    for number, (x, y) in spots(picture).items():
        result = records.results[number]
        assert result.disk_bytes is not None
        assert result.nll is not None
        assert x * picture.x.high == pytest.approx(result.disk_bytes / 1e6)
        assert picture.y.low + y * (picture.y.high - picture.y.low) == pytest.approx(result.nll)
    # what stands beside an axis lies there, too
    for tick in picture.x.ticks:
        assert tick.at * picture.x.high == pytest.approx(float(tick.text))
    names = {label.text for label in picture.wide}
    assert names == {"base", "healed", "int4"}


def test_bars_are_intervals_and_the_slowest_in_twenty(records: Records) -> None:
    picture = tradeoff_pictures(runtime_points(records.results))["decode/nll/linear"]
    assert picture is not None
    for number, (x, y) in spots(picture).items():
        (mark,) = [m for s in picture.series for m in s.marks if (m.x, 1 - m.y) == (x, y)]
        assert mark.across is not None
        assert mark.down is not None
        assert mark.across == pytest.approx((x / 1.12, x))
        low, high = records.results[number].nll_ci95 or (0.0, 0.0)
        assert picture.y.share(low) == pytest.approx(1 - mark.down[1])
        assert picture.y.share(high) == pytest.approx(1 - mark.down[0])
        assert mark.down[0] < mark.y < mark.down[1]


def test_log_scale_keeps_what_is_not_positive_on_the_strip(records: Records) -> None:
    better = [
        r.model_copy(update={"delta_nll": -0.02, "delta_nll_ci95": (-0.03, -0.01)}) for r in records.results
    ]
    picture = tradeoff_pictures(runtime_points(better))["disk/delta/log"]
    assert picture is not None
    assert picture.y.ticks[0].text == "≤ 0"
    assert [y for _, y in spots(picture).values()] == pytest.approx([picture.y.ticks[0].at] * len(better))


def curves(records: Records) -> list[tuple[str, Picture]]:
    return loss_pictures((v.name, step) for v in records.run.variants for step in v.steps)


def heights(picture: Picture, series: str) -> list[float]:
    """The values of a curve, read off its axis."""
    (line,) = [s.curve for s in picture.series if s.name == series]
    assert line is not None
    low, high = picture.y.low, picture.y.high
    return [low + (1 - y) * (high - low) for _, y in line.points]


def test_what_distillation_minimises_is_not_drawn_as_nats_per_token(records: Records) -> None:
    """Its objective and the held-out NLL are two quantities; on one axis it looked like overfitting."""
    own, heldout = [picture for name, picture in curves(records) if name == "distill"]
    step = records.variant("healed").steps[1]
    assert [s.name for s in own.series] == [s.name for s in heldout.series] == ["healed"]
    assert own.y_title == "what the pass minimises (a unit of its own)"
    assert heldout.y_title == "held-out NLL (nats per token)"
    assert heights(own, "healed") == pytest.approx([point.objective for point in step.curve()])
    scored = [point.heldout for point in step.curve() if point.heldout is not None]
    assert heights(heldout, "healed") == pytest.approx([step.notes["heldout_before"], *scored])
    assert own.y.high < min(scored), "one axis would have held both"


def test_training_on_text_and_held_out_text_share_a_unit(records: Records) -> None:
    (picture,) = [picture for name, picture in curves(records) if name == "train"]
    step = records.variant("base").steps[1]
    assert "(nats per token)" in picture.y_title
    assert [s.name for s in picture.series] == ["base", "base, held out"]
    assert heights(picture, "base") == pytest.approx([point.objective for point in step.curve()])
    last = step.curve()[-1]
    assert picture.hover[len(step.curve()) - 1][3] == [
        "base", f"{units.significant(last.objective, 4)} at {units.count(last.tokens)} tokens",
    ]  # fmt: skip


def test_comparison_says_first_what_must_not_be_compared(records: Records) -> None:
    run, results, recipe = records
    other = run.model_copy(update={"data": run.data.model_copy(update={"evaluation_sha256": "f" * 64})})
    page = Page(compare([(run, results, recipe), (other, results, recipe)]))
    assert "The evaluation data differ" in page.text
    assert page.text.index("Do not compare quality") < page.text.index("Trade-offs")
    assert "No Pareto front is drawn" in page.text
    assert "tiny (2)" in page.text
    same = Page(compare([records, records]))
    assert "the numbers compare" in same.text


@pytest.mark.parametrize(("copies", "whole"), [(0, True), (40, True), (150, False)])
def test_a_page_has_at_most_two_megabytes(records: Records, copies: int, whole: bool) -> None:
    many = records.many(copies)
    html = render(*many)[0]
    assert len(html.encode()) <= MOST_BYTES == 2_000_000
    assert ("Left out, so that this page stays below 2 MB" in html) != whole
    table = html[html.index('<table id="results"') :]
    for result in many.results:
        assert f">{result.variant}</th>" in table


def test_rendering_is_pure_and_light(records: Records) -> None:
    assert render(*records) == render(*records)
    code = "import sys, compress.report; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
