"""Records to pages: `render` for one run, `compare` for several.

Method: the other modules turn records into sentences, rows, chains and figures; this one hands them
to the templates. HTML is escaped by jinja, and whatever reaches a script travels as JSON. Markdown is
escaped by the environment's `finalize`, so that no value can break a table. The HTML is one file: styles,
script and pictures are inside, and its content security policy forbids every request. The pictures shown
first are part of the document and need no script; all that a reader can switch to travel beside it, packed.

Cost: about 9 kB for each variant of two passes, most of it notes and settings. A page above 2 MB is drawn
again with less (see `_LEFT_OUT`) and says what it leaves out; the table of results always stays (1,205 lines
make a page of 1.7 MB). Limits: pure functions of the records, so a page shows nothing that they do not hold.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from compress.records.results import Result
from compress.records.run import RunRecord
from compress.report.chains import chains
from compress.report.curves import loss_pictures
from compress.report.differences import differences
from compress.report.encoder_latency import latency_rows, left_out
from compress.report.flips import changed, labelled_facts
from compress.report.markdown import escape_markdown, visible
from compress.report.narrative import headlines
from compress.report.pictures import Picture, percent
from compress.report.plots import (
    SIZE_AXES,
    SPEED_AXES,
    Point,
    hover_lines,
    measured_axes,
    measured_qualities,
    run_points,
    runtime_points,
    tradeoff_pictures,
)
from compress.report.provenance import definitions, facts, machine_facts, protocol_facts, samples_by_prompt
from compress.report.rows import (
    RUN_COLUMN,
    Column,
    base_name,
    markdown_columns,
    ordered,
    reference_rows,
    shown_columns,
    table_rows,
)
from compress.report.scores import quality_words

MOST_BYTES = 2_000_000  # of a page
# what a page that would be larger leaves out, one after the other
_LEFT_OUT = (
    "what the passes noted and their settings",
    "samples, and texts whose decision changed",
    "all tables but the results (report.md has them)",
    "loss curves and what the pictures can switch to",
)

Runs = list[tuple[RunRecord, list[Result], str]]


def render(run: RunRecord, results: list[Result], recipe_yaml: str) -> tuple[str, str]:
    """The report of one run: (HTML, Markdown)."""
    lines = ordered(run, results)
    columns = shown_columns(lines, run.references, run.label_references)
    points = runtime_points(lines)
    losses = _losses([("", run)])
    context: dict[str, Any] = {
        "title": run.recipe_name,
        "run": run,
        "base": base_name(run),
        "columns": columns,
        "markdown_columns": markdown_columns(columns),
        "qualities": measured_qualities(lines),
        "sizes": measured_axes(lines, SIZE_AXES),
        "speeds": measured_axes(lines, SPEED_AXES),
        "quality": quality_words(lines),
        "headlines": headlines(run, lines),
        "rows": table_rows(run, lines, columns),
        "reference_rows": reference_rows(run, columns),
        "latency_rows": latency_rows(run, lines),
        "latency_left_out": left_out(lines),
        "chains": chains(run, lines),
        "samples": samples_by_prompt(run),
        "changed": changed(run),
        "data_facts": facts(run, lines) + labelled_facts(run.data.labelled),
        "machine_facts": machine_facts(run, lines),
        "protocol_facts": protocol_facts(lines),
        "definitions": definitions(lines),
        "recipe": recipe_yaml,
        "losses": [name for name, _ in losses],
    }
    html = _html("report.html.j2", points, tradeoff_pictures(points), losses, context)
    return html, _markdown().get_template("report.md.j2").render(context)


def compare(runs: Runs) -> str:
    """One HTML page over several runs; says first what must not be compared."""
    labels = _labels([run for run, _, _ in runs])
    labelled = [
        (label, run, ordered(run, results)) for label, (run, results, _) in zip(labels, runs, strict=True)
    ]
    found = differences(labelled)
    comparable = not any(difference.affects != "note" for difference in found)
    everything = [result for _, _, results in labelled for result in results]
    columns = shown_columns(
        everything,
        [reference for run, _, _ in runs for reference in run.references],
        [reference for run, _, _ in runs for reference in run.label_references],
    )
    points = run_points([(label, results) for label, _, results in labelled])
    losses = _losses([(label, run) for label, run, _ in labelled])
    context: dict[str, Any] = {
        "title": " / ".join(labels),
        "columns": (RUN_COLUMN, *columns),
        "qualities": measured_qualities(everything),
        "sizes": measured_axes(everything, SIZE_AXES),
        "speeds": measured_axes(everything, SPEED_AXES),
        "differences": found,
        "comparable": comparable,
        "rows": [row for label, run, results in labelled for row in table_rows(run, results, columns, label)],
        "reference_rows": [row for label, run, _ in labelled for row in reference_rows(run, columns, label)],
        "sections": [
            {
                "label": label,
                "headlines": headlines(run, results),
                "data_facts": facts(run, results) + labelled_facts(run.data.labelled),
                "machine_facts": machine_facts(run, results),
                "protocol_facts": protocol_facts(results),
                "recipe": recipe,
            }
            for (label, run, results), (_, _, recipe) in zip(labelled, runs, strict=True)
        ],
        "definitions": definitions(everything),
        "losses": [name for name, _ in losses],
    }
    return _html("compare.html.j2", points, tradeoff_pictures(points, comparable), losses, context)


def _group_spans(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """(name, number of columns) for each stretch of columns of one group."""
    return [(name, len(list(stretch))) for name, stretch in groupby(columns, key=lambda column: column.group)]


def _brief(value: float | str) -> str:
    """What to sort by: seven digits of a number are enough to order what is shown with three.

    >>> _brief(0.0311886615298), _brief(98727), _brief("torch")
    ('0.03118866', '98727', 'torch')
    """
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _losses(labelled: list[tuple[str, RunRecord]]) -> list[tuple[str, Picture]]:
    """Loss pictures over the runs; a step that several variants share is drawn once."""
    steps = []
    for label, run in labelled:
        seen = set()
        for variant in run.variants:
            for step in variant.steps:
                if step.fingerprint not in seen:
                    seen.add(step.fingerprint)
                    steps.append((f"{label}: {variant.name}" if label else variant.name, step))
    return loss_pictures(steps)


def _labels(runs: list[RunRecord]) -> list[str]:
    """Recipe names, numbered where two runs share one."""
    names = [run.recipe_name for run in runs]
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _html(
    template: str,
    points: list[Point],
    tradeoffs: dict[str, Picture | None],
    losses: list[tuple[str, Picture]],
    context: dict[str, Any],
) -> str:
    """The page, with as much as `MOST_BYTES` allow."""
    environment = _html_environment()
    pictures = tradeoffs | {f"loss/{index}": picture for index, (_, picture) in enumerate(losses)}
    draw: Any = environment.get_template("chart.html.j2").module
    drawn = {
        key: None if picture is None else str(draw.chart(picture)).strip()
        for key, picture in pictures.items()
    }
    html = ""
    for count in range(len(_LEFT_OUT) + 1):
        left_out = _LEFT_OUT[:count]
        html = environment.get_template(template).render(
            context,
            drawn={key: None if code is None else Markup(code) for key, code in drawn.items()},
            book=_packed(points, pictures, drawn) if count < len(_LEFT_OUT) else "",
            left_out=left_out,
            show_notes=count < 1,
            show_samples=count < 2,
            show_chains=count < 3,
            show_losses=count < 4,
        )
        if len(html.encode()) <= MOST_BYTES:
            break
    return html


def _packed(points: list[Point], pictures: dict[str, Picture | None], drawn: dict[str, str | None]) -> str:
    """All pictures and what their points tell, as JSON in gzip in base64, for `charts.js`."""
    book = {
        "lines": [hover_lines(point) for point in points],
        "pictures": {
            key: None
            if picture is None
            else {
                "html": drawn[key],
                "points": [[round(x, 4), round(y, 4), *r] for x, y, *r in picture.hover],
            }
            for key, picture in pictures.items()
        },
    }
    text = json.dumps(book, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _shown(value: object) -> object:
    """A value of the page; markup of ours stays what it is."""
    return visible(value) if type(value) is str else value


@cache
def _html_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("compress.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["group_spans"] = _group_spans
    environment.filters["percent"] = percent
    environment.filters["brief"] = _brief
    return environment


@cache
def _markdown() -> Environment:
    environment = Environment(
        loader=PackageLoader("compress.report", "templates"),
        autoescape=False,  # `finalize` escapes each value for Markdown instead
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment
