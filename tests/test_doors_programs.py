"""Templates, tokenizers, graphs and records that somebody else wrote, and what the command line says."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from cli_helpers import invoke, refused
from export_models import exported, tokens, torch_logits
from export_models import tiny_bundle as exportable
from hostile_files import damaged, said
from training_set import tiny_bundle

from compress.cli import commands
from compress.cli.terminal import _harmless
from compress.errors import UserError
from compress.generation.chat import render
from compress.generation.generator import TextGenerator
from compress.host.tokenizer_files import tokenizer_file
from compress.models.checkpoints import load_tokenizer
from compress.models.layers import matches
from compress.records.results import Result, read_results, write_results
from compress.report.markdown import escape_markdown
from compress.report.page import _html_environment
from compress.report.text import text_table
from compress.run import registry
from compress.run.preflight import saved_name
from compress.runtimes.onnx_runtime import OnnxRuntime
from compress.text.documents import Document, load_documents
from compress.text.windows import DataConfig, prepare

MESSAGES = [{"role": "user", "content": "hi"}]


class TestTemplates:
    def write(self, folder, template):
        (folder / "chat_template.jinja").write_text(template)
        return folder

    def test_what_a_template_writes(self, tmp_path):
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}"
        assert render(self.write(tmp_path, template), MESSAGES) == "<user>HI"

    @pytest.mark.parametrize(
        ("template", "words"),
        [
            ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more"),
            ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
             "{{ n.s }}", "too much memory"),
            ("{{ 'a' * 10 ** 11 }}", "too much memory"),
            ("{{ 'a' * 2 ** 25 }}", "33,554,432 characters"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
            ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
            ("{{ raise_exception('no\n\x1b[31mway') }}", r"no \x1b[31mway"),
        ],
    )  # fmt: skip
    def test_limits(self, tmp_path, template, words):
        assert words in said(render, self.write(tmp_path, template), MESSAGES)

    def test_a_terminal_sees_no_escapes(self, monkeypatch):
        text = "a\x1b[31mb\x9b2J\n\tc\x07\u202e"
        assert _harmless(text) == text  # a file gets what was written
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        assert _harmless(text) == "a[31mb2J\n\tc"


def test_a_tokenizer_encodes_as_it_did_or_is_refused(tmp_path):
    plain = tmp_path / "plain"
    tiny_bundle().tokenizer.save_pretrained(plain)
    whole, file = (plain / "tokenizer.json").read_bytes(), tmp_path / "tokenizer.json"
    file.write_bytes(whole)
    assert tokenizer_file(file).encode("def x").ids == load_tokenizer(plain)("def x")["input_ids"]
    for seed in range(24):
        file.write_bytes(damaged(whole, seed))
        with contextlib.suppress(UserError):
            tokenizer_file(file)
    file.write_bytes(whole[:-9])
    assert "cannot be read" in said(tokenizer_file, file)


@pytest.mark.parametrize("load", [load_tokenizer, lambda folder: tokenizer_file(folder / "tokenizer.json")])
def test_a_normalizer_that_writes_much_for_little(load, tmp_path):
    tiny_bundle().tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    for length, fits in ((1000, True), (1001, False)):
        one = {"type": "Replace", "pattern": {"String": "z"}, "content": "b" * length}
        normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, one]}
        file.write_text(json.dumps({**content, "normalizer": normalizer}))
        if fits:
            load(tmp_path)
        else:
            assert "its normalizer puts in 1,001 characters at a time" in said(load, tmp_path)


def test_a_text_that_an_expression_gives_up_on(tmp_path):
    bundle = tiny_bundle()
    bundle.model.save_pretrained(tmp_path / "a")
    bundle.tokenizer.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+(a+)+$"}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps({**json.loads(file.read_text()), "pre_tokenizer": split}))
    generator = TextGenerator(tmp_path / "a", threads=1)
    assert "its tokenizer cannot cut a text" in said(generator.encode, "a" * 4000 + "b")
    text = "\n".join("a" * 4000 + "b" for _ in range(3))
    windows = DataConfig(text="x", window=8, evaluation_windows=2, calibration_windows=2, heldout_windows=2)
    documents = [Document(str(n), text) for n in range(9)]
    assert "its tokenizer cannot cut a text" in said(
        prepare, windows, documents, load_tokenizer(tmp_path / "a"), training=True
    )


class TestTexts:
    def test_a_table_that_packs_gigabytes(self, tmp_path):
        pyarrow, file = pytest.importorskip("pyarrow"), tmp_path / "t.parquet"
        parquet = pytest.importorskip("pyarrow.parquet")
        for count, fits in ((3, True), (40_000, False)):
            values = pyarrow.array(["a" * 1_000_000])
            rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), values)
            parquet.write_table(pyarrow.table({"text": rows}), file)
            if fits:
                assert [len(d.text) for d in load_documents(str(file))] == [1_000_000] * 3
            else:
                assert "more than 100 times its bytes of text" in said(load_documents, str(file))


def test_a_graph_computes_or_is_refused_when_it_is_opened_or_run(tmp_path):
    bundle = exportable("llama")
    exported(bundle, tmp_path)
    file, ids = tmp_path / "model.onnx", tokens(batch=1, length=5)
    whole, expected = file.read_bytes(), torch_logits(bundle.model, ids)
    assert np.allclose(OnnxRuntime(tmp_path, threads=1).logits(ids), expected, atol=1e-4)
    for length in (0, 9, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:length])
        assert "model.onnx" in said(OnnxRuntime, tmp_path, threads=1)
    file.write_bytes(whole.replace(b"logits_to_keep", b"logits_to_keeq"))
    assert "not a graph as export_onnx writes it" in said(OnnxRuntime, tmp_path, threads=1)
    file.write_bytes(whole)
    beyond = np.full_like(ids, 10**6)  # no row of the embedding
    assert "ONNX Runtime cannot run its graph" in said(OnnxRuntime(tmp_path, threads=1).logits, beyond)
    file.unlink()
    os.mkfifo(file)
    assert "holds no model.onnx" in said(OnnxRuntime, tmp_path, threads=1)


class TestRecords:
    RESULT = Result(variant="a", runtime="torch", device="cpu", artifact="a", nll=1.5)

    def test_results_come_back(self, tmp_path):
        write_results(tmp_path / "results.jsonl", [self.RESULT] * 2)
        assert read_results(tmp_path / "results.jsonl") == [self.RESULT] * 2

    def test_damaged_ones_are_refused(self, tmp_path):
        file = tmp_path / "results.jsonl"
        write_results(file, [self.RESULT])
        whole = file.read_bytes()
        for seed in range(24):
            file.write_bytes(damaged(whole, seed))
            with contextlib.suppress(UserError):
                read_results(file)
        file.write_bytes(whole + b"\xff\n")
        assert "is not UTF-8 text" in said(read_results, file)
        file.write_bytes(b"[" * 99_999)
        assert "results.jsonl:1: no result line" in said(read_results, file)

    @pytest.mark.parametrize("content", [b"\xff", b"[" * 9999, b"a: &a [*a]", b"name: [", b"2024-99-99"])
    def test_a_recipe_that_is_none_names_no_run(self, tmp_path, content):
        (tmp_path / "recipe.yaml").write_bytes(content)
        assert saved_name(tmp_path) is None


class TestCommandLine:
    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (FileNotFoundError("Dataset 'x' doesn't exist\non the Hub"), "error: Dataset 'x' doesn't exist"),
            (OSError(28, "No space", "a.bin"), "error: a.bin: no space left; free some"),
            (OSError("640 requested and 0 written"), "error: disk: no space left; free some"),
            (OSError(5, "Input/output error", "a.bin"), "error: a.bin: Input/output error"),
            (FileNotFoundError(2, "No such file or directory", "a\x1b[0m"), r"error: a\x1b[0m: No such file"),
            (MemoryError(), "error: there is not enough memory"),
        ],
    )
    def test_what_the_system_refuses_is_not_always_a_full_disk(self, monkeypatch, error, line):
        def fails():
            raise error

        monkeypatch.setattr(commands, "app", fails)
        outcome = invoke("doctor")
        assert outcome.code == 2
        assert outcome.err.startswith(line)
        assert outcome.err.count("\n") == 1

    def test_tables_and_pages_spell_controls_out(self):
        line = TestRecords.RESULT.model_copy(update={"variant": "a\x1b[31mb\u202e"})
        assert "a\\x1b[31mb\\u202e" in text_table([line])
        assert escape_markdown("a\x1b]0;x\x07") == r"a\\x1b\]0;x\\x07"
        assert _html_environment().from_string("{{ x }}").render(x="<b>\x9b2J\n") == "&lt;b&gt;\\x9b2J\n"

    def test_names_in_brackets_are_names(self, tmp_path):
        text = tmp_path / "t.txt"
        text.write_text("word " * 9000)
        outcome = invoke("run", "demo", "--text", text, "-o", tmp_path / "[bold]" / "[x]", "--dry-run")
        assert "[bold]/[x]" in outcome.out.replace("\n", "")

    def test_selectors_that_are_no_regular_expressions(self):
        assert "select: 're:[' is no regular expression" in said(matches, "model.layers.0", "re:[")
        assert "no regular expression" in refused(
            "run", "demo", "--dry-run", "--set", "variants={a: [{quantize_round: {select: ['re:[']}}]}"
        )

    def test_a_plugin_that_exits(self, monkeypatch):
        class Entry:
            name = value = "leaver"

            @staticmethod
            def load():
                raise SystemExit("bye")

        monkeypatch.setattr(registry, "entry_points", lambda group: [Entry])
        assert "pass 'leaver': leaver cannot be imported (bye)" in said(registry.pass_class, "leaver")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_while_the_commands_are_imported(self, number):
        code = (
            "import os, sys\n"
            "class Late:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'compress.cli.commands': os.kill(os.getpid(), " + str(int(number)) + ")\n"
            "sys.meta_path.insert(0, Late())\n"
            "from compress.cli import main\n"
            "main()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (130, "interrupted; nothing was begun\n")
