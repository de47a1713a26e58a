"""The shipped demo, tiny, from the command line to the end; then the commands that use what it left."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_helpers import DATA, SHAPE, built_once, invoke, results, settings, tree, write_text

from compress.artifact.bundle import Bundle
from compress.artifact.counts import parameter_counts, weight_file_bytes

TORCH = ["base", "pruned", "student", "int8", "int4", "student-int4"]
ONNX = ["base", "int8", "int4", "student-int4"]
FIELDS = (
    "variant runtime device artifact disk_bytes weight_bytes parameters nonzero_parameters peak_rss_bytes "
    "perplexity bits_per_byte nll nll_ci95 delta_nll delta_nll_ci95 kl_to_base kl_ci95 top1_agreement "
    "prefill_tokens_per_second decode_tokens_per_second prefill_seconds_p50 prefill_seconds_p95 "
    "decode_seconds_p50 decode_seconds_p95 decode_seconds_p99 load_seconds protocol machine versions "
    "fingerprint cosine_distance cosine_ci95 score_name score score_ci95 delta_score delta_score_ci95 "
    "metrics flips flips_lost flips_gained prefill_round_seconds decode_round_seconds timing_session "
    "busy_share encoder_latency"
).split()


def demo(folder: Path, *more: str) -> list[object]:
    """The arguments that run the demo tiny; no pass and no variant is taken away."""
    overrides = settings(
        "threads=1",
        f"model.create={json.dumps(SHAPE)}",
        *(f"data.{name}={value}" for name, value in DATA.items()),
        "base.passes.train={tokens: 12000, batch: 16}",
        "base.passes.export_onnx.check_tokens=64",
        "variants.pruned.passes.distill.tokens=2000",
        "variants.student.passes.student.blocks=1",
        "variants.student.passes.distill.tokens=2000",
        "measure={prefill_tokens: 16, rounds: 2}",
        "report={prompt: The model, sample_tokens: 8}",
        *more,
    )
    return ["run", "demo", "-o", folder / "run", "--text", folder / "text", *overrides]


def run_demo(folder: Path) -> None:
    write_text(folder / "text")
    outcome = invoke(*demo(folder))
    assert outcome.code == 0, outcome.err
    assert f"report: {folder / 'run' / 'report.html'}" in outcome.out


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return built_once(tmp_path_factory, "demo", run_demo)


@pytest.fixture
def run(place):
    return place / "run"


@pytest.fixture
def lines(run):
    return results(run)


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in tree(folder)}


def same(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()


def test_the_folder_holds_what_the_design_says(run):
    visible = {p.name for p in run.iterdir() if not p.name.startswith(".")}
    records = {"recipe.yaml", "results.jsonl", "run.json", "evaluation.npy", "report.html", "report.md"}
    assert visible == {*TORCH, *records}
    for variant in TORCH:
        files = {p.name for p in (run / variant).iterdir()}
        assert {"config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"} <= files
        assert ("onnx" in files) == (variant in ONNX)
    for variant in ONNX:
        files = {p.name for p in (run / variant / "onnx").iterdir()}
        assert {"model.onnx", "config.json", "tokenizer.json", "manifest.json"} <= files
    assert not list(run.rglob("*.partial"))
    assert not any((run / ".work").iterdir()), "work folders are gone when their step is done"


def test_one_line_per_variant_and_runtime_with_the_fields_of_the_design(lines):
    assert set(lines) == {(v, "torch") for v in TORCH} | {(v, "onnxruntime") for v in ONNX}
    for line in lines.values():
        assert list(line) == FIELDS


def test_the_fields_agree_with_each_other_and_with_the_files(run, lines):
    record = json.loads((run / "run.json").read_text())
    base = lines["base", "torch"]
    predicted = DATA["evaluation_windows"] * (DATA["window"] - 1)
    for (variant, runtime), line in lines.items():
        assert line["perplexity"] == pytest.approx(math.exp(line["nll"]))
        nats = line["bits_per_byte"] * math.log(2) * record["data"]["evaluation_bytes"]
        assert nats == pytest.approx(line["nll"] * predicted)
        assert line["nll_ci95"][0] < line["nll"] < line["nll_ci95"][1]
        assert line["prefill_tokens_per_second"] == pytest.approx(16 / line["prefill_seconds_p50"], rel=0.01)
        assert line["decode_tokens_per_second"] == pytest.approx(1 / line["decode_seconds_p50"], rel=0.01)
        assert 0 < line["prefill_seconds_p50"] <= line["prefill_seconds_p95"]
        assert 0 < line["decode_seconds_p50"] <= line["decode_seconds_p95"] <= line["decode_seconds_p99"]
        assert line["artifact"] == (variant if runtime == "torch" else f"{variant}/onnx")
        files = [p for p in (run / line["artifact"]).iterdir() if p.is_file()]
        assert line["disk_bytes"] == sum(p.stat().st_size for p in files)
        manifest = json.loads((run / line["artifact"] / "manifest.json").read_text())
        assert line["fingerprint"] == manifest["fingerprint"]
        assert line["protocol"]["threads"] == 1
        assert line["peak_rss_bytes"] > line["weight_bytes"] > 0
        if runtime == "torch":
            counts = parameter_counts(Bundle.load(run / variant).model)
            assert (line["parameters"], line["nonzero_parameters"]) == counts
        if (variant, runtime) == ("base", "torch"):
            assert line["delta_nll"] is line["kl_to_base"] is line["top1_agreement"] is None
        else:
            assert line["delta_nll"] == pytest.approx(line["nll"] - base["nll"], abs=1e-6)
            assert line["delta_nll_ci95"][0] <= line["delta_nll"] <= line["delta_nll_ci95"][1]
            assert -1e-6 < line["kl_ci95"][0] <= line["kl_to_base"] <= line["kl_ci95"][1]
            assert 0 <= line["top1_agreement"] <= 1
    pruned = lines["pruned", "torch"]
    assert pruned["nonzero_parameters"] < 0.65 * pruned["parameters"]
    assert lines["base", "onnxruntime"]["kl_to_base"] < 1e-6


@torch.no_grad()
def independent_perplexity(model, windows):
    logits = model(torch.from_numpy(windows).long()).logits[:, :-1].double()
    targets = torch.from_numpy(windows[:, 1:]).long()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).exp())


@pytest.mark.parametrize("variant", TORCH)
def test_perplexity_agrees_with_an_independent_script(run, lines, variant):
    from transformers import AutoModelForCausalLM

    windows = np.load(run / "evaluation.npy")
    if (run / variant / "model.safetensors").exists():  # anybody's script can load it
        model = AutoModelForCausalLM.from_pretrained(run / variant)
    else:
        model = Bundle.load(run / variant).model
    assert independent_perplexity(model, windows) == pytest.approx(
        lines[variant, "torch"]["perplexity"], rel=1e-3
    )


def test_weight_files_are_as_small_as_promised(run):
    whole = weight_file_bytes(run / "base")
    assert weight_file_bytes(run / "int8") <= 0.28 * whole
    assert weight_file_bytes(run / "int4") <= 0.18 * whole


def test_the_trained_base_beats_the_unigram_reference(run, lines):
    references = {
        r["name"]: r["perplexity"] for r in json.loads((run / "run.json").read_text())["references"]
    }
    assert lines["base", "torch"]["perplexity"] < references["unigram"]


def test_the_report_names_every_variant(run):
    html, markdown = (run / "report.html").read_text(), (run / "report.md").read_text()
    for variant in TORCH:
        assert variant in html
        assert variant in markdown
    assert "<script src" not in html
    assert "The model" in html


def test_running_again_does_nothing_new(place, run, monkeypatch):
    def started(*_, **__):
        raise AssertionError("a measurement was started")

    monkeypatch.setattr("compress.measure.process.WorkerProcess.__init__", started)
    before = digests(run)
    outcome = invoke(*demo(place))
    assert outcome.code == 0, outcome.err
    assert all(line.endswith("done before") for line in outcome.err.splitlines()), outcome.err
    assert digests(run) == before


def test_a_changed_field_recomputes_only_its_chain(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "copy")
    before = digests(tmp_path / "copy" / "run")
    told = SimpleNamespace(references=[], label_references=[], variants=[])
    monkeypatch.setattr("compress.api.tell", lambda recipe, made, say: told)  # measuring has tests of its own
    monkeypatch.setattr("compress.api.write_report", lambda folder: None)
    outcome = invoke(*demo(tmp_path / "copy", "variants.int4.passes.quantize_gptq.damping=0.05"))
    assert outcome.code == 0, outcome.err
    ran = [line.split(":")[0] for line in outcome.err.splitlines() if not line.endswith("done before")]
    assert ran == ["int4 1/2 quantize_gptq", "int4 2/2 export_onnx"]
    after = digests(tmp_path / "copy" / "run")
    moved = {name.split("/")[0] for name in after if before.get(name) != after[name]}
    assert {name for name in moved if not name.startswith(".")} == {"int4", "recipe.yaml"}


def test_files_that_are_gone_are_made_again(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "copy")
    folder = tmp_path / "copy" / "run"
    before = digests(folder)
    monkeypatch.setattr(
        "compress.api.tell",
        lambda recipe, made, say: SimpleNamespace(references=[], label_references=[], variants=[]),
    )
    monkeypatch.setattr("compress.api.write_report", lambda folder: None)
    graph = folder / "int8" / "onnx" / "model.onnx"
    # a step is named by a hash of what made it: which comes first changes with the code
    wrote = [found for found in (folder / ".steps").glob("*/onnx/model.onnx") if same(found, graph)]
    (step,) = {found.parent.parent for found in wrote}
    graph.unlink()  # of the variant: it is in the step, too
    (folder / "base" / "manifest.json").write_text("{")
    shutil.rmtree(step / "onnx")
    outcome = invoke(*demo(tmp_path / "copy"))
    assert outcome.code == 0, outcome.err
    ran = [line for line in outcome.err.splitlines() if not line.endswith("done before")]
    told, again = ran
    assert told.startswith("int8 2/2 export_onnx: done again, since a file is not what was written"), told
    assert again.startswith("int8 2/2 export_onnx: "), again
    assert set(digests(folder)) == set(before)


def test_compare_draws_one_page_over_several_runs(run, place, tmp_path):
    shutil.copytree(run, tmp_path / "second")
    page = tmp_path / "pages" / "both.html"
    outcome = invoke("compare", run, tmp_path / "second", "-o", page)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == f"page: {page}"
    html = page.read_text()
    assert "student-int4" in html
    assert "second" in html


def test_bench_measures_plain_directories_and_artifacts(run, place, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / "base" / name, plain)
    outcome = invoke(
        "bench", plain, run / "int8" / "onnx", "--base", plain, "--text", place / "text",
        "--window", 32, "--windows", 12, "--threads", 1, "-o", tmp_path / "results.jsonl",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    first, second = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert list(first) == list(second) == FIELDS
    assert (first["variant"], first["runtime"], first["kl_to_base"]) == ("plain", "torch", None)
    assert (second["runtime"], second["artifact"]) == ("onnxruntime", str(run / "int8" / "onnx"))
    assert 0 < second["kl_to_base"] < 0.01
    assert "plain" in outcome.out


def test_bench_refuses_another_vocabulary(run, tmp_path):
    other = shutil.copytree(run / "base", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<more>"})
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = invoke("bench", run / "base", other, "--text", "stdlib")
    assert outcome.code == 2
    assert "has another vocabulary than" in outcome.err


def test_bench_refuses_a_vocabulary_of_the_same_size_with_two_tokens_exchanged(run, tmp_path):
    other = shutil.copytree(run / "base", tmp_path / "other")
    (other / "manifest.json").unlink()  # somebody else's
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["x"], ids["a"] = ids["a"], ids["x"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = invoke("bench", run / "base", other, "--text", "stdlib")
    assert outcome.code == 2
    assert "has another vocabulary than" in outcome.err


def generate(artifact: Path, *more: object) -> str:
    outcome = invoke("generate", artifact, "-p", "The model", "--tokens", 24, "--threads", 1, *more)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("The model")
    return outcome.out


def test_generate_writes_the_same_text_in_torch_and_onnx_runtime(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = generate(run / "base")
    assert generate(run / "base" / "onnx") == text
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    model = AutoModelForCausalLM.from_pretrained(run / "base")
    ids = tokenizer("The model", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == text.removesuffix("\n")


def test_generate_runs_every_artifact_and_samples_by_seed(run):
    for variant in ONNX:
        for artifact in (run / variant, run / variant / "onnx"):
            generate(artifact)
    warm = ["--temperature", 1.5, "--top-k", 50, "--top-p", 0.95]
    first, again, other = (generate(run / "base" / "onnx", *warm, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other
