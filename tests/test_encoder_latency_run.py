"""An encoder's grid of batches and lengths, timed in real worker processes and shown on the page."""

from pathlib import Path

import numpy as np
import pytest
from cli_helpers import write_text
from encoder_models import CONTEXT, write_encoder

from compress.measure import turns
from compress.measure.encoder_latency import REPETITIONS, TURNS
from compress.measure.harness import measure
from compress.measure.turns import Target
from compress.records.protocol import MeasureProtocol
from compress.records.results import EncoderLatency, read_results, write_results
from compress.report.page import render
from compress.text.windows import Windows

GRID = {"encoder_batches": (1, 2), "encoder_lengths": (16, 128)}
QUICK = MeasureProtocol(prefill_tokens=16, rounds=1, threads=1, **GRID)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    return write_encoder(folder / "model", write_text(folder / "text"), head=True, blocks=1)


@pytest.fixture(scope="module")
def windows() -> Windows:
    tokens = np.random.default_rng(0).integers(5, 40, (3, 24)).astype(np.int32)
    return Windows(tokens=tokens, bytes=400, sha256="abc")


def test_an_encoder_is_timed_by_batch_and_length(encoder, windows, tmp_path):
    targets = [Target(name, "torch", encoder, name) for name in ("base", "same")]
    found = measure(targets, encoder, windows, QUICK, workdir=tmp_path, own_lengths=[5, 900, 12])
    for row in found:
        cells = {(cell.batch, cell.length): cell for cell in row.encoder_latency}
        assert set(cells) == {(1, 16), (2, 16), (1, None), (2, None)}
        for (batch, _), cell in cells.items():
            assert cell.repetitions == TURNS * REPETITIONS
            assert 0 < cell.seconds_p50 <= cell.seconds_p95
            assert cell.texts_per_second == pytest.approx(batch / cell.seconds_p50)
        assert cells[2, 16].tokens_per_second == pytest.approx(16 * cells[2, 16].texts_per_second)
        one = cells[1, None]  # the longest is cut to the context
        assert one.tokens_per_second == pytest.approx((5 + CONTEXT + 12) / 3 * one.texts_per_second)
        reason = f"longer than the model's context of {CONTEXT} tokens"
        assert row.protocol["encoder_left_out"] == {"1 x 128": reason, "2 x 128": reason}
        assert row.prefill_seconds_p50 > 0
    # a line that was read back counts as measured under this protocol
    write_results(tmp_path / "results.jsonl", found)
    known = read_results(tmp_path / "results.jsonl")
    assert known == found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "WorkerProcess", None)  # nothing may be started any more
        assert measure(targets, encoder, windows, QUICK, done=known) == found


def test_where_models_do_not_fit_together_each_has_its_grid_in_its_rounds(
    encoder, windows, tmp_path, monkeypatch
):
    monkeypatch.setattr(turns, "available_memory_bytes", lambda: 1)
    (row,) = measure([Target("base", "torch", encoder)], None, windows, QUICK, workdir=tmp_path)
    assert row.protocol["processes"] == "restarted each round"
    assert [(c.batch, c.length, c.repetitions) for c in row.encoder_latency] == [(1, 16, REPETITIONS)]
    assert row.protocol["encoder_left_out"]["2 x 16"] == "its answer takes 0.0 GB"


def test_without_seconds_there_is_no_grid(encoder, windows, tmp_path):
    none = QUICK.model_copy(update={"encoder_seconds": 0})
    (row,) = measure([Target("base", "torch", encoder)], None, windows, none, workdir=tmp_path)
    assert row.encoder_latency == ()
    assert "encoder_left_out" not in row.protocol


def test_the_page_has_a_table_of_it_and_says_what_is_missing(records):
    late = {"encoder_left_out": {"1 x 512": "no time left"}}
    cell = EncoderLatency(batch=1, length=16, texts_per_second=100.0, repetitions=5)
    lines = [
        r.model_copy(update={"encoder_latency": (cell,), "protocol": {**r.protocol, **late}})
        for r in records.results
    ]
    html, markdown = render(records.run, lines, "")
    for page in (html, markdown):
        assert "Latency by batch and length" in page
        assert "Not timed: 1 x 512, no time left." in page
    table = markdown.split("### Latency by batch and length")[1].split("###")[0]
    rows = [row for row in table.splitlines() if row.startswith("|")]
    assert len(rows) == 2 + len(lines)
    assert {row.count("|") for row in rows} == {10}
    assert all("Latency by batch" not in page for page in render(*records))
