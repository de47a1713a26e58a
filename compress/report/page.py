"""Records to pages: `render` for one run, `compare` for several.

Method: the other modules turn records into sentences, rows, chains and figures; this one hands them
to the templates. HTML is escaped by jinja, and whatever reaches a script travels as JSON. Markdown is
escaped by the environment's `finalize`, so that no value can break a table. The HTML is one file:
styles, script and Plotly are inside, and its content security policy forbids every request.

Cost: about 4.9 MB a page, of which Plotly is 4.8. Limits: pure functions of the records, so a page
shows nothing that the records do not hold.
"""

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from compress.records.records import Result, RunRecord
from compress.report.chains import chains
from compress.report.differences import differences
from compress.report.markdown import escape_markdown
from compress.report.narrative import headlines
from compress.report.plots import (
    Figure,
    loss_figures,
    measured_qualities,
    run_points,
    runtime_points,
    tradeoff_figures,
)
from compress.report.provenance import definitions, facts, machine_facts, protocol_facts, samples_by_prompt
from compress.report.rows import (
    RUN_COLUMN,
    Column,
    base_name,
    ordered,
    reference_rows,
    shown_columns,
    table_rows,
)

Runs = list[tuple[RunRecord, list[Result], str]]


def render(run: RunRecord, results: list[Result], recipe_yaml: str) -> tuple[str, str]:
    """The report of one run: (HTML, Markdown)."""
    lines = ordered(run, results)
    figures: dict[str, Figure | None] = dict(tradeoff_figures(runtime_points(lines)))
    losses = _losses([("", run)])
    for index, (_, figure) in enumerate(losses):
        figures[f"loss/{index}"] = figure
    context: dict[str, Any] = {
        "title": run.recipe_name,
        "run": run,
        "base": base_name(run),
        "columns": shown_columns(lines),
        "qualities": measured_qualities(lines),
        "headlines": headlines(run, lines),
        "rows": table_rows(run, lines, shown_columns(lines)),
        "reference_rows": reference_rows(run.references, shown_columns(lines)),
        "chains": chains(run, lines),
        "samples": samples_by_prompt(run),
        "data_facts": facts(run, lines),
        "machine_facts": machine_facts(run, lines),
        "protocol_facts": protocol_facts(lines),
        "definitions": definitions(),
        "recipe": recipe_yaml,
        "losses": [name for name, _ in losses],
    }
    html = _html("report.html.j2", figures, context)
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
    columns = shown_columns(everything)
    points = run_points([(label, results) for label, _, results in labelled])
    figures: dict[str, Figure | None] = dict(tradeoff_figures(points, with_front=comparable))
    losses = _losses([(label, run) for label, run, _ in labelled])
    for index, (_, figure) in enumerate(losses):
        figures[f"loss/{index}"] = figure
    context: dict[str, Any] = {
        "title": " / ".join(labels),
        "columns": (RUN_COLUMN, *columns),
        "qualities": measured_qualities(everything),
        "differences": found,
        "comparable": comparable,
        "rows": [row for label, run, results in labelled for row in table_rows(run, results, columns, label)],
        "reference_rows": [
            row for label, run, _ in labelled for row in reference_rows(run.references, columns, label)
        ],
        "sections": [
            {
                "label": label,
                "headlines": headlines(run, results),
                "data_facts": facts(run, results),
                "machine_facts": machine_facts(run, results),
                "protocol_facts": protocol_facts(results),
                "recipe": recipe,
            }
            for (label, run, results), (_, _, recipe) in zip(labelled, runs, strict=True)
        ],
        "definitions": definitions(),
        "losses": [name for name, _ in losses],
    }
    return _html("compare.html.j2", figures, context)


def _group_spans(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """(name, number of columns) for each stretch of columns of one group."""
    return [(name, len(list(stretch))) for name, stretch in groupby(columns, key=lambda column: column.group)]


def _losses(labelled: list[tuple[str, RunRecord]]) -> list[tuple[str, Figure]]:
    """Loss figures over the runs; a step that several variants share is drawn once."""
    steps = []
    for label, run in labelled:
        seen = set()
        for variant in run.variants:
            for step in variant.steps:
                if step.fingerprint not in seen:
                    seen.add(step.fingerprint)
                    steps.append((f"{label}: {variant.name}" if label else variant.name, step))
    return loss_figures(steps)


def _labels(runs: list[RunRecord]) -> list[str]:
    """Recipe names, numbered where two runs share one."""
    names = [run.recipe_name for run in runs]
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _html(template: str, figures: dict[str, Figure | None], context: dict[str, Any]) -> str:
    return (
        _html_environment().get_template(template).render(context, figures=figures, plotly=Markup(_plotly()))
    )


@cache
def _html_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("compress.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["group_spans"] = _group_spans
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


@cache
def _plotly() -> str:
    """Plotly's own script, as installed."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
