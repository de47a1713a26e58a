"""`compress-lm quantize`: the best recipe known for a request, refused before any work, or served."""

import shlex
from pathlib import Path

import pytest
from cli_helpers import invoke, refused, write_text
from encoder_models import tiny_encoder
from export_models import tiny_bundle, tiny_model

import compress
from compress.artifact.folder import disk_bytes
from compress.cli.commands import _size
from compress.run.request import Request, choose


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("quantize") / "text", documents=40, words=200)


@pytest.fixture
def model(bundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "model")
    return tmp_path / "model"


def test_one_line_writes_for_two_runtimes_and_says_how_to_serve(model, text, tmp_path):
    out = tmp_path / "out"
    arguments = (
        "quantize",
        model,
        "--to",
        "onnx,gguf",
        "-o",
        out,
        "--text",
        text,
        "--no-measure",
        "--threads",
        1,
    )
    done = invoke(*arguments)
    assert done.code == 0, done.err
    assert (out / "onnx/model.onnx").is_file()
    assert (out / "gguf/model.gguf").is_file()
    assert "onnx: quantize_gptq; groups of 64, with zero-points" in done.err
    assert "fisher and tune_scales are left out" in done.err
    assert f"llama-server -m {out}/gguf/model.gguf" in done.out
    again = invoke(*arguments)
    assert again.err.count("done before") == 4, again.err
    generated = invoke("generate", out / "onnx", "--prompt", "The model", "--tokens", "3")
    assert generated.code == 0


def test_from_python_it_measures_base_and_result_in_the_runtime(model, text, tmp_path):
    said: list[str] = []
    done = compress.quantize(
        model, bits=8, to="onnx", out=tmp_path / "out", text=text, effort="quick", threads=1, say=said.append
    )
    assert [(r.variant, r.runtime) for r in done.results] == [
        ("base", "torch"), ("base", "onnxruntime"), ("int8", "torch"), ("int8", "onnxruntime")
    ]  # fmt: skip
    assert done.results[3].kl_to_base < 0.01
    assert done.files == {"onnx": tmp_path / "out/onnx"}
    assert (tmp_path / "out/report.html").is_file()
    assert said[: len(done.reasons)] == done.reasons
    assert not [line for line in said if "done before" in line]  # one pass over the recipe, not two


def test_what_is_shipped_keeps_to_the_budget(model, text, tmp_path):
    to = "onnx"
    whole = compress.quantize(
        model,
        bits=8,
        to=to,
        out=tmp_path / "whole",
        text=text,
        threads=1,
        measured=False,
        say=lambda line: None,
    )
    budget = int(0.95 * disk_bytes(whole.files[to]))
    done = compress.quantize(
        model, to=to, out=tmp_path / "out", text=text, budget_bytes=budget, threads=1, measured=False,
        say=lambda line: None,
    )  # fmt: skip
    assert disk_bytes(done.files[to]) <= budget


def test_what_a_runtime_cannot_take_is_said_before_any_work(model, text, tmp_path):
    def line(*arguments: object) -> str:
        said = refused("quantize", model, "-o", tmp_path / "out", "--text", text, *arguments)
        assert not (tmp_path / "out").exists()
        return said

    assert line("--bits", "3") == "error: --bits: onnx has no kernel for 3 bits; it has 2, 4, 8"
    assert line("--to", "onxx").endswith("--to: 'onxx' is unknown; did you mean 'onnx'?")
    assert line("--to", ",").endswith("--to: names no runtime; known: onnx, gguf, compressed-tensors")
    assert line("--budget", "92 potatoes").endswith("write 92MB, 1.5GB or a number of bytes")
    assert "effort: 'most' is unknown" in line("--effort", "most")
    tiny_model("gpt_neox").save_pretrained(tmp_path / "neox")
    compress.load(model).tokenizer.save_pretrained(tmp_path / "neox")
    assert "--to gguf: export_gguf: model_type 'gpt_neox' is not supported" in refused(
        "quantize", tmp_path / "neox", "--to", "gguf", "-o", tmp_path / "out", "--text", text
    )


def test_a_short_text_is_cut_into_short_windows_and_one_too_short_is_refused(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One two three, and for each of them a line of its own.\n" * 40)
    choice = choose(Request(str(model), text=str(path)), "x")
    assert any(reason.startswith("text: ") and "to judge by" in reason for reason in choice.reasons)
    path.write_text("Too short.\n")
    with pytest.raises(compress.UserError, match=r"--text: \d+ tokens are too few"):
        choose(Request(str(model), text=str(path)), "x")


@pytest.mark.parametrize(
    ("text", "expected"), [("92MB", 92_000_000), ("1.5 GB", 1_500_000_000), ("4KiB", 4096), ("77", 77)]
)
def test_sizes(text, expected):
    assert _size(text) == expected


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("gpt2", "onnx"),
        ("bert", "onnx"),
        ("llama", "compressed-tensors"),
    ],
)
def test_the_lines_that_serve_a_file_serve_it(name, to, text, tmp_path):
    made = tiny_encoder(name) if name == "bert" else tiny_bundle(name)
    made.save(tmp_path / "model")
    done = compress.quantize(
        tmp_path / "model", bits=8, to=to, out=tmp_path / "out", text=text, threads=1, measured=False,
        say=lambda line: None,
    )  # fmt: skip
    lines = done.serving()[to]
    assert len(lines) == 3
    program = []
    for line in lines:
        command, *arguments = shlex.split(line, comments=True)
        if command == "compress-lm":
            served = invoke(*arguments, "--tokens", "4")
            assert served.code == 0, served.err
        elif command == "python":
            exec(arguments[1])
        elif command != "vllm":  # which needs a GPU
            program.append(line)
    exec("\n".join(program), {})
