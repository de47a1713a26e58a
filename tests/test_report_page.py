"""The rendered page and its Markdown, without a browser."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from report_records import bare, demo_run

from compress.records.records import Result, RunRecord
from compress.report import compare, render
from compress.report.plots import runtime_points, tradeoff_figures

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


def figures_of(html: str) -> dict[str, dict[str, object] | None]:
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    assert match
    figures: dict[str, dict[str, object] | None] = json.loads(match[1])
    return figures


def hostile_run() -> tuple[RunRecord, list[Result], str]:
    run, results, recipe = demo_run(HOSTILE)
    variants = [
        v.model_copy(
            update={
                "name": HOSTILE,
                "steps": [s.model_copy(update={"notes": {HOSTILE: HOSTILE}}) for s in v.steps],
            }
        )
        if v.name == "int4"
        else v
        for v in run.variants
    ]
    samples = [
        s.model_copy(update={"variant": HOSTILE, "prompt": HOSTILE, "text": HOSTILE * 2}) for s in run.samples
    ]
    run = run.model_copy(
        update={
            "variants": variants,
            "samples": samples,
            "machine": {HOSTILE: HOSTILE},
            "versions": {"x": HOSTILE},
        }
    )
    results = [r.model_copy(update={"variant": HOSTILE}) if r.variant == "int4" else r for r in results]
    return run, results, recipe + HOSTILE


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(*demo_run())[0])


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "img", "base"), tag
        for name in ("src", "href", "srcset", "data", "action"):
            assert name not in attributes, (tag, attributes)
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
    assert sum(t == "button" for t, _ in page.tags) == len(headings)


def test_the_page_holds_what_a_reader_needs(page: Page) -> None:
    run, _, recipe = demo_run()
    for needed in (
        run.data.evaluation_sha256,
        "AMD EPYC 9R45",
        "2.13.0",
        recipe,
        "Kneser-Ney trigram",
        "No gain",
    ):
        assert needed in page.text
    assert "not significant" in page.text
    assert "tokens per parameter" in page.text


def test_hostile_names_stay_text() -> None:
    html, markdown = render(*hostile_run())
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.tags) == 3  # figures, Plotly, ours
    assert HOSTILE in page.text
    assert "<script>alert" not in html
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    hover = json.dumps(figures_of(html))
    assert "<script>" not in hover  # Plotly reads tags in labels, so they are escaped there too
    assert "&lt;script&gt;" in hover
    compared = compare([hostile_run(), hostile_run()])
    assert sum(tag == "script" for tag, _ in Page(compared).tags) == 3


def test_absent_numbers_are_dashes_and_nothing_breaks() -> None:
    run, results, recipe = demo_run()
    empty = run.model_copy(update={"step_results": [], "samples": [], "references": []})
    html, markdown = render(empty, bare(results), recipe)
    page = Page(html)
    assert "None" not in page.text
    assert not re.search(r"\bnan\b", page.text)
    assert "–" in page.text
    assert "None" not in markdown
    assert all(figure is None for key, figure in figures_of(html).items() if not key.startswith("loss"))


def test_without_latency_the_size_picture_remains() -> None:
    run, results, recipe = demo_run()
    untimed = [
        r.model_copy(
            update={name: None for name in Result.model_fields if "seconds" in name or "per_second" in name}
        )
        for r in results
    ]
    figures = figures_of(render(run, untimed, recipe)[0])
    assert figures["decode/kl/log"] is None
    assert figures["disk/kl/log"] is not None


def test_one_variant_only() -> None:
    run, results, recipe = demo_run()
    alone = run.model_copy(update={"variants": run.variants[:1], "step_results": [], "references": []})
    html, markdown = render(
        alone, [r for r in results if r.variant == "base" and r.runtime == "torch"], recipe
    )
    assert "Nothing to compare yet" in html
    assert "| base | PyTorch |" in markdown
    render(alone.model_copy(update={"variants": []}), [], "")


def test_markdown_tables_are_valid() -> None:
    for run, results, recipe in (demo_run(), hostile_run()):
        markdown = render(run, results, recipe)[1]
        table = [line for line in markdown.splitlines() if line.startswith("|")]
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in table]
        assert len(table) == 2 + len(results) + len(run.references)
        assert set(bars) == {12}
        assert re.fullmatch(r"(\| :?-+:? )+\|", table[1])
        assert run.data.evaluation_sha256 in markdown


def painted(value: object) -> object:
    if isinstance(value, str):
        return "#123456" if value.startswith("--") else value
    if isinstance(value, list):
        return [painted(inner) for inner in value]
    return {key: painted(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def test_every_figure_is_valid_plotly() -> None:
    figures = figures_of(render(*demo_run())[0])
    assert len(figures) == 5 * 3 * 2 + 2
    for figure in figures.values():
        assert go.Figure(painted(figure)).data


def test_log_scale_keeps_what_is_not_positive_on_the_strip() -> None:
    _, results, _ = demo_run()
    better = [r.model_copy(update={"delta_nll": -0.02, "delta_nll_ci95": (-0.03, -0.01)}) for r in results]
    figure = tradeoff_figures(runtime_points(better))["disk/delta/log"]
    assert figure is not None
    heights = [y for trace in figure["data"] for y in trace["y"]]
    assert min(heights) > 0
    assert figure["layout"]["yaxis"]["ticktext"][0] == "≤ 0"


def test_comparison_says_first_what_must_not_be_compared() -> None:
    run, results, recipe = demo_run()
    other = run.model_copy(update={"data": run.data.model_copy(update={"evaluation_sha256": "f" * 64})})
    page = Page(compare([(run, results, recipe), (other, results, recipe)]))
    assert "The evaluation data differ" in page.text
    assert page.text.index("Do not compare quality") < page.text.index("Trade-offs")
    assert "No Pareto front is drawn" in page.text
    assert "demo (2)" in page.text
    same = Page(compare([(run, results, recipe), (run, results, recipe)]))
    assert "the numbers compare" in same.text


def test_rendering_is_pure_and_light() -> None:
    assert render(*demo_run()) == render(*demo_run())
    code = "import sys, compress.report; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
