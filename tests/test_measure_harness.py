"""The harness end to end on a tiny model, in real worker processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.artifact.folder import disk_bytes
from compress.errors import UserError
from compress.host import machine
from compress.host.memory import peak_rss_bytes
from compress.measure import harness, reference, turns
from compress.measure.harness import Continuation, measure, save_result
from compress.measure.inner_steps import InnerSteps
from compress.measure.process import WorkerError, WorkerProcess
from compress.measure.reference import Reference
from compress.measure.turns import Target
from compress.measure.unfinished import Unfinished
from compress.records.manifest import PassRecord
from compress.records.protocol import MeasureProtocol
from compress.records.results import read_results
from compress.records.run import VariantRecord
from compress.runtimes.torch_runtime import TorchRuntime
from compress.text.windows import Windows

V = 53
FAST = MeasureProtocol(prefill_tokens=16, rounds=2, threads=1)


def save_model(folder, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=96, initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"), 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("other"), 1)


@pytest.fixture(scope="module")
def windows():
    tokens = np.random.default_rng(0).integers(0, V, (6, 24)).astype(np.int32)
    return Windows(tokens=tokens, bytes=400, sha256="abc")


@pytest.mark.usefixtures("cold_workers")
def test_measures_artifacts_and_takes_over_what_is_done(base, other, windows, tmp_path, monkeypatch):
    targets = [Target("other", "torch", other, "f1", "run/other"), Target("base", "torch", base, "f0")]
    samples, lines = {}, tmp_path / "results.jsonl"
    results = measure(
        targets,
        base,
        windows,
        FAST,
        workdir=tmp_path,
        continuation=Continuation(prompt=[3, 4, 5], limit=7),
        on_result=lambda result: save_result(lines, result),
        on_sample=lambda target, tokens: samples.update({target.variant: tokens}),
    )
    assert [r.variant for r in results] == ["other", "base"]
    assert sorted(r.variant for r in read_results(lines)) == ["base", "other"]
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]  # base logits are gone
    row, reference = results
    model = LlamaForCausalLM.from_pretrained(other).eval()
    ids = torch.from_numpy(windows.tokens.astype(np.int64))
    with torch.inference_mode():
        nll = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        text = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert row.nll == pytest.approx(nll.item(), rel=1e-5)
    assert samples["other"] == text[0, 3:].tolist()
    assert row.kl_to_base > 0
    assert reference.kl_to_base is None
    assert row.delta_nll == pytest.approx(row.nll - reference.nll)
    assert row.artifact == "run/other"
    assert row.parameters == row.nonzero_parameters == model.num_parameters()
    assert row.weight_bytes == 4 * model.num_parameters()
    assert row.disk_bytes == sum(p.stat().st_size for p in other.iterdir())
    assert 50e6 < row.peak_rss_bytes < 2e9
    assert 0 < row.decode_seconds_p50 <= row.decode_seconds_p95 <= row.decode_seconds_p99
    assert row.prefill_tokens_per_second == pytest.approx(16 / row.prefill_seconds_p50)
    assert row.load_seconds > 0
    assert row.protocol["threads"] == 1
    assert row.protocol["prompt_tokens"] == 16
    assert (row.protocol["windows"], row.protocol["window"]) == (6, 24)
    assert row.machine["cores"] == machine.usable_cores()

    monkeypatch.setattr(turns, "WorkerProcess", None)  # nothing may be started any more
    assert measure(targets, base, windows, FAST, done=read_results(lines)) == results


def test_restarts_processes_where_models_do_not_fit_together(base, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "available_memory_bytes", lambda: 1)
    protocol = MeasureProtocol(prefill_tokens=8, rounds=1, threads=1)
    (row,) = measure([Target("base", "torch", base)], None, windows, protocol, workdir=tmp_path)
    assert row.protocol["processes"] == "restarted each round"
    assert row.decode_seconds_p99 is not None
    assert row.kl_to_base is None


def test_steps_are_scored_in_the_process_of_the_base(base, other, windows, tmp_path, monkeypatch):
    started = []

    class Counting(WorkerProcess):
        def __init__(self, *args, what, **kwargs):
            started.append(what)
            super().__init__(*args, what=what, **kwargs)

    monkeypatch.setattr(turns, "WorkerProcess", Counting)
    steps = [Target(n, "torch", path, n) for n, path in (("one", other), ("two", base), ("three", other))]
    kept = tmp_path / "measured.json"
    one, two, three = measure([], base, windows, FAST, steps=steps, workdir=tmp_path, unfinished=kept)
    assert one.kl_to_base == three.kl_to_base > 0
    assert two.kl_to_base is None
    assert one.decode_seconds_p50 is None
    assert one.peak_rss_bytes is None
    assert one.weight_bytes == two.weight_bytes
    assert started == ["the base model in torch"]
    assert measure([], base, windows, FAST, steps=steps, unfinished=kept) == [one, two, three]
    targets = [Target("base", "torch", base, "f0")]
    again = measure(targets, base, windows, FAST, steps=steps[:2], workdir=tmp_path)
    assert [r.nll for r in again[1:]] == [one.nll, two.nll]
    assert started[1:] == ["base in torch"]
    with pytest.raises(ValueError, match="there is none"):
        measure([], None, windows, FAST, steps=steps)


def test_parts_of_the_windows_give_the_same_and_take_little_disk(base, other, windows, tmp_path, monkeypatch):
    targets = [Target("other", "torch", other, "f1"), Target("base", "torch", base, "f0")]
    steps = [Target(n, "torch", path, n) for n, path in (("one", other), ("two", base))]
    once = FAST.model_copy(update={"rounds": 1})

    def go(kept=None, **more):
        found = measure(targets, base, windows, once, steps=steps, workdir=tmp_path, unfinished=kept, **more)
        values = [v for r in found for v in (r.nll, *r.nll_ci95, r.kl_to_base, r.delta_nll, r.top1_agreement)]
        return pytest.approx([v for v in values if v is not None], rel=1e-6)  # rows share calls otherwise

    whole = go()
    assert len(whole.expected) == 4 * 3 + 2 * 3  # other and one differ from the base
    most, compare = [], Reference.compare

    def watched(self, worker, path, part, advance):
        most.append(len(list(self.folder.glob("window-*.npy"))))
        return compare(self, worker, path, part, advance)

    monkeypatch.setattr(reference, "LOGITS_BYTES", 4 * V * 24 * 2 + 1)  # of two windows
    monkeypatch.setattr(Reference, "compare", watched)
    assert go().expected == whole
    assert most == [2] * 9  # three parts of each: other, one, two
    # cut off after some parts, it goes on with the rest
    kept, asked, ask = tmp_path / "measured.json", [], WorkerProcess.ask

    def stop(self, do, *args, **fields):
        asked.append(fields.get("part"))
        if stopping and asked.count((4, 6)) == 1:
            raise KeyboardInterrupt
        return ask(self, do, *args, **fields)

    monkeypatch.setattr(WorkerProcess, "ask", stop)
    stopping = True
    with pytest.raises(KeyboardInterrupt):
        go(kept)
    stopping = False
    asked.clear()
    assert go(kept).expected == whole
    assert {part for part in asked if part} == {(4, 6)}


def test_what_was_cut_off_is_neither_timed_nor_scored_again(base, other, windows, tmp_path, monkeypatch):
    asked = []
    ask = WorkerProcess.ask

    def telling(self, do, *args, **fields):
        asked.append((self.what, do))
        return ask(self, do, *args, **fields)

    def stop(result):
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkerProcess, "ask", telling)
    targets = [Target("other", "torch", other, "f1"), Target("base", "torch", base, "f0")]
    kept, lines = tmp_path / "measured.json", []

    def go(**more):
        found = measure(targets, base, windows, FAST, done=lines, unfinished=kept, workdir=tmp_path, **more)
        return found, [what for what, do in asked if do == "time_round"]

    with pytest.raises(KeyboardInterrupt):
        go(on_result=lambda result: lines.append(result) or stop(result))
    assert [line.variant for line in lines] == ["base"]
    asked.clear()
    (row, _), timed = go()
    assert not timed
    assert row.kl_to_base > 0
    assert row.decode_seconds_p99 is not None
    assert row.peak_rss_bytes > 50e6
    common = harness._common(FAST, windows)
    assert Unfinished(kept, common).timings([targets[0].key]) is not None
    assert Unfinished(kept, common | {"machine": {}}).timings([targets[0].key]) is None
    kept.write_text("{", encoding="utf-8")
    assert Unfinished(kept, common).timings([targets[0].key]) is None


def test_a_step_that_is_the_end_of_another_chain_is_not_scored_again():
    def step(name, fingerprint):
        return PassRecord(
            name=name, config={}, seconds=0, peak_rss_bytes=None, parent=None, fingerprint=fingerprint,
            seed=0, notes={},
        )  # fmt: skip

    def variant(name, *steps):
        return VariantRecord(
            name=name, parent="base", artifact=name, exports=(), fingerprint=steps[-1].fingerprint,
            steps=list(steps),
        )  # fmt: skip

    prune, heal, export = step("prune", "p"), step("distill", "h"), step("export_onnx", "e")
    base = variant("base", step("create", "c"), step("train", "t"))
    variants = [base, variant("cut", prune, export), variant("healed", prune, heal)]
    inner = InnerSteps.of(variants)
    assert inner.steps == (("healed", 0, prune),)
    assert inner.ends == {"t": "base", "p": "cut", "h": "healed"}
    places = {"p": Path("p")}
    assert inner.targets(places) == []
    assert [t.path for t in InnerSteps(inner.steps, {}).targets(places)] == [Path("p")]


def test_an_artifact_that_does_not_load_is_named(base, windows, tmp_path):
    (tmp_path / "broken").mkdir()
    with pytest.raises(UserError, match="empty in torch"):
        measure([Target("empty", "torch", tmp_path / "broken")], base, windows, FAST, workdir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_a_dead_worker_is_an_error_with_its_last_words_and_no_hang(tmp_path):
    with WorkerProcess("none", 1, what="x in none", log=tmp_path / "log") as worker:
        assert worker.ask("ready") == {}
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"x in none: the worker died in 'ready', exit status -9"):
            worker.ask("ready")
    with WorkerProcess("none", 1, what="x in none", log=tmp_path / "log") as worker:
        with pytest.raises(WorkerError, match="RuntimeError: the first command must be load"):
            worker.ask("count_parameters")
        with pytest.raises(UserError, match="'none' is unknown"):
            worker.ask("load", path="nowhere")
        with pytest.raises(WorkerError, match=r"last words:[\s\S]*unknown command 'fly'"):
            worker.ask("fly")


def test_a_silent_worker_is_given_up(tmp_path):
    with WorkerProcess("none", 1, what="x", log=tmp_path / "log") as worker:
        worker.ask("ready")
        worker.patience = 0.2
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match="no word for"):
            worker.ask("ready")
        worker.kill()


def test_workers_end_when_their_parent_is_killed(tmp_path):
    code = (
        "from pathlib import Path; from compress.measure.process import WorkerProcess; import time\n"
        f"w = WorkerProcess('none', 1, what='x', log=Path({str(tmp_path / 'log')!r}))\n"
        "w.ask('ready'); print(w.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_worker_for_onnx_imports_neither_torch_nor_pydantic():
    code = (
        "import sys, compress.measure.worker; import compress.runtimes\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'onnxruntime') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_torch_runtime_decodes_what_it_would_have_read(base):
    runtime = TorchRuntime(base, threads=1)
    tokens = np.random.default_rng(1).integers(0, V, (2, 10)).astype(np.int32)
    before = torch.get_num_threads()
    full = runtime.logits(tokens)
    assert (full.shape, full.dtype) == ((2, 10, V), np.float32)
    state = runtime.prefill(tokens[:, :6])
    np.testing.assert_allclose(state.logits, full[:, 5], atol=1e-5)
    for step in range(6, 10):
        state = runtime.decode(state, tokens[:, step])
        np.testing.assert_allclose(state.logits, full[:, step], atol=1e-5)
    assert state.length == 10
    assert runtime.context == 96
    assert torch.get_num_threads() == before


def test_prompts_leave_room_in_the_context():
    assert FAST.prompt_tokens(1000) == 16
    assert MeasureProtocol().prompt_tokens(256) == 256 - MeasureProtocol().decodes_per_round
    with pytest.raises(ValueError, match="greater than or equal to 30"):
        MeasureProtocol(repetitions=5)


def test_memory_and_machine(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"x" * 1000)
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert disk_bytes(tmp_path) == 10
    assert disk_bytes(tmp_path / "onnx") == disk_bytes(tmp_path / "onnx" / "model.onnx") == 1000
    assert peak_rss_bytes() > 1e6
    assert machine.machine() == machine.machine()
    assert machine.versions()["torch"] == torch.__version__
