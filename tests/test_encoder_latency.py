"""An encoder's grid of batches and lengths: which cells are timed, and what is said of the others."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from compress.measure.encoder_latency import REPETITIONS, Grid, cells_of, fixed, own, summarise, time_cell
from compress.measure.latency import Samples, Timing
from compress.records.results import EncoderLatency, Result
from compress.records.run import DataRecord, RunRecord, VariantRecord
from compress.report.encoder_latency import latency_rows, left_out


def test_cells_go_from_the_cheapest_to_the_dearest():
    cells = cells_of((8, 1, 8), (129, 16), [3, 9, 4])
    assert [c.name for c in cells] == ["1 x own", "1 x 16", "3 x own", "8 x 16", "1 x 129", "8 x 129"]
    assert cells_of((), (16,)) == []
    assert own(2, [3, 9, 4, 5, 7]).tokens == 21  # the last text fills no batch
    assert own(4, [3, 9]).widths == (9,)


def test_a_repetition_is_a_pass_over_one_batch_as_wide_as_its_longest_text():
    seen = []

    def prefill(tokens):
        seen.append(tokens.tolist())
        return SimpleNamespace(logits=np.zeros((len(tokens), 7), np.float32))

    tokens = np.arange(18, dtype=np.int32).reshape(2, 9)
    answer = time_cell(SimpleNamespace(prefill=prefill), tokens, (9, 5), first=1)
    assert len(answer["seconds"]) == REPETITIONS
    assert answer["width"] == 7
    assert [len(rows[0]) for rows in seen] == [5, 5, 9, 5, 9, 5]  # one that is not counted before them
    assert seen[0] == tokens[:, :5].tolist()


def test_speeds_are_those_of_the_median_and_padding_is_no_token():
    seconds = [0.1, 0.3, 0.2, 0.2]
    found = EncoderLatency(**summarise(own(2, [3, 9, 4, 5]), seconds))
    assert (found.batch, found.length, found.repetitions) == (2, None, 4)
    assert found.seconds_p50 == pytest.approx(np.median(seconds))
    assert found.seconds_p95 is None  # of four repetitions it would be the largest
    assert found.texts_per_second == pytest.approx(2 / 0.2)
    assert found.tokens_per_second == pytest.approx((3 + 9 + 4 + 5) / 2 / 0.2)
    many = list(np.linspace(1, 2, 20))
    found = EncoderLatency(**summarise(fixed(8, 16), many))
    assert found.seconds_p95 == pytest.approx(np.quantile(many, 0.95))
    assert found.tokens_per_second == pytest.approx(16 * found.texts_per_second)
    assert EncoderLatency(**summarise(fixed(1, 16), [0.1])).seconds_p50 is None


def test_cells_that_do_not_fit_are_left_out_with_the_reason():
    small, middle, large = cells = cells_of((1,), (16, 32, 512))
    grid = Grid(cells, 256, left=100.0, turns=2)
    assert grid.fits(small, 1.0, 10**9)
    assert not grid.fits(small, 0.0, 10**9)
    grid.add(small, {"seconds": [0.1] * 5, "width": 1000})
    assert grid.expected(middle) == pytest.approx(0.2)  # twice the tokens
    assert grid.fits(middle, 6 * 0.2, 10**9)
    assert not grid.fits(middle, 6 * 0.2 - 0.01, 10**9)
    assert grid.left_out == {"1 x 32": "no time left"}
    assert not grid.fits(middle, 100.0, 300_000)
    assert grid.left_out == {"1 x 32": "its answer takes 0.0 GB"}
    assert not grid.fits(large, 100.0, 10**9)
    assert grid.left_out["1 x 512"] == "longer than the model's context of 256 tokens"
    grid.add(middle, {"seconds": [0.3] * 5, "width": 1000})
    assert not grid.fits(middle, 0.1, 10**9)  # in this turn; it was timed before
    assert list(grid.left_out) == ["1 x 512"]
    assert [(c["length"], c["repetitions"]) for c in grid.summary()] == [(16, 5), (32, 5)]


def test_a_turn_takes_half_of_what_is_left_but_for_the_last(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("compress.measure.encoder_latency.time.monotonic", lambda: now[0])
    grid = Grid([], 64, left=8.0, turns=2)
    with grid.turn() as ends:
        assert ends == 54.0
        now[0] += 3.0
    with grid.turn() as ends:
        assert ends == 58.0


def test_what_was_timed_outlives_a_kill():
    cell = summarise(fixed(1, 16), [0.1, 0.2])
    timing = Timing(rounds=[Samples([1.0], [])], cells=[cell], cells_left_out={"1 x 512": "no time left"})
    back = json.loads(json.dumps(asdict(timing)))
    assert Timing(**{**back, "rounds": [Samples(**r) for r in back["rounds"]]}) == timing


RUN = RunRecord(
    recipe_name="tiny", base="base", machine={}, versions={},
    variants=[
        VariantRecord(name=name, parent=parent, artifact=name, fingerprint=name, steps=[])
        for name, parent in (("base", None), ("int4", "base"))
    ],
    data=DataRecord(
        source="text", window=16, train_tokens=0, train_sha256="", calibration_tokens=0,
        calibration_sha256="", evaluation_tokens=0, evaluation_sha256="", evaluation_bytes=0,
    ),
)  # fmt: skip


def line(variant: str, runtime: str, speeds: dict[int, float], **protocol: object) -> Result:
    cells = tuple(
        EncoderLatency(
            batch=batch, length=16, seconds_p50=batch / speed, texts_per_second=speed,
            tokens_per_second=16 * speed, repetitions=5,
        )
        for batch, speed in speeds.items()
    )  # fmt: skip
    return Result(
        variant=variant,
        runtime=runtime,
        device="cpu",
        artifact=variant,
        encoder_latency=cells,
        protocol=protocol,
    )


def test_the_page_compares_with_the_base_in_the_same_runtime():
    late = {"encoder_left_out": {"1 x 512": "no time left", "8 x 512": "no time left"}}
    results = [
        line("base", "torch", {1: 100.0, 8: 200.0}, **late),
        line("base", "onnxruntime", {1: 400.0}),
        line("int4", "torch", {1: 150.0, 8: 100.0}, **late),
        line("int4", "onnxruntime", {1: 1000.0, 8: 1600.0}),
    ]
    rows = latency_rows(RUN, results)
    assert [(r.variant, r.runtime, r.batch, r.ratio) for r in rows] == [
        ("base", "PyTorch", "1", "–"),
        ("base", "PyTorch", "8", "–"),
        ("base", "ONNX Runtime", "1", "–"),
        ("int4", "PyTorch", "1", "1.50"),
        ("int4", "PyTorch", "8", "0.500"),
        ("int4", "ONNX Runtime", "1", "2.50"),
        ("int4", "ONNX Runtime", "8", "–"),
    ]
    assert (rows[3].texts, rows[3].tokens, rows[3].p50, rows[3].p95) == ("150", "2400", "6.67", "–")
    assert left_out(results) == [
        "Not timed (base in PyTorch, int4 in PyTorch): 1 x 512, 8 x 512, no time left."
    ]
    assert left_out(results[::2]) == ["Not timed: 1 x 512, 8 x 512, no time left."]
