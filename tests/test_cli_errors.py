"""Bad input: one line that begins with `error:`, exit code 2, and nothing left half-written."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from cli_helpers import SHAPE, refused, settings, tree, write_recipe, write_text

from compress.models.create import Architecture, create
from compress.run.store import alone
from compress.text.documents import load_documents

GPTQ, PRUNE = {"quantize_gptq": {"format": "int4"}}, {"prune_magnitude": {"sparsity": 0.5}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text):
    """A plain model directory, as transformers writes it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = create(Architecture(**SHAPE), load_documents(str(text)), seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture
def recipe(text, tmp_path):
    return write_recipe(
        tmp_path / "tiny.yaml", text, base=["export_onnx"], variants={"v": [PRUNE], "q": [GPTQ]}
    )


@pytest.fixture
def refuse(recipe, tmp_path):
    """Run the recipe with further arguments; it must refuse before it has written anything."""

    def check(*arguments: object) -> str:
        before = tree(tmp_path)
        line = refused("run", recipe, "-o", tmp_path / "run", *arguments)
        assert tree(tmp_path) == before
        return line

    return check


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("variants.v=[quantize_gtpq]", ["variants.v.passes.0", "did you mean 'quantize_gptq'?"]),
        ("variants.v.passes.prune_magnitude.sparsty=0.5", ["sparsty: unknown", "did you mean 'sparsity'?"]),
        ("variants.q.passes.quantize_gptq.format={kind: int4, gruop: 9}", ["gruop", "did you mean 'group'?"]),
        ("dta.window=32", ["dta: unknown field", "did you mean 'data'?"]),
        ("data.windw=32", ["data.windw: unknown field", "did you mean 'window'?"]),
        ("model.create.hiden=64", ["model.create.hiden: unknown field", "did you mean 'hidden'?"]),
        ("measure.repetition=40", ["measure.repetition: unknown field", "did you mean 'repetitions'?"]),
        ("variants.v.form=q", ["variants.v.form: unknown field", "did you mean 'from'?"]),
        ("variants.v.passes.prune_magnitude.sparsity=half", ["sparsity: 'half' is not valid", "number"]),
        ("variants.v.passes.prune_magnitude.sparsity=1.5", ["sparsity: 1.5 is not valid", "less than 1"]),
        ("variants.q.passes.quantize_gptq.format=int7", ["format", "int7"]),
        ("data.window=4", ["data.window: 4 is not valid", "greater than or equal to 8"]),
        ("data.window=64.5", ["data.window: 64.5 is not valid"]),
        ("data.window=129", ["data.window: 129 tokens", "at most 128"]),
        ("measure.repetitions=3", ["measure.repetitions: 3 is not valid", "30"]),
        ("seed=-1", ["seed: -1 is not valid"]),
        ("model.create.heads=3", ["hidden=64 must be an even multiple of heads=3"]),
        ("name=a/b", ["name: 'a/b' is not valid"]),
        ("variants.v.passes.0.prune_magnitude.select=['*.mpl']", ["v.passes.0", "*.mpl", "matches no layer"]),
        ("variants.v.passes=[quantize_round, prune_magnitude]", ["cannot come after quantize_round"]),
        ("variants.v.from=q", ["prune_magnitude cannot come after quantize_gptq", "put it before"]),
        ("variants.v.from=w", ["variants.v.from: 'w' is no variant"]),
        ("variants.v.from=v", ["variants.v.from", "circle"]),
        ("variants.v=7", ["variants.v: 7 is not valid", "list of passes"]),
        ("variants.v.passes=[{prune_magnitude: {}, train: {}}]", ["variants.v.passes.0", "is not valid"]),
        ("variants=[]", ["variants: [] is not valid"]),
        ("variants={'': [quantize_round]}", ["variants: '' is not usable as the name of a folder"]),
        ("variants={a b: [quantize_round]}", ["variants: 'a b' is not usable as the name of a folder"]),
        ("variants.q.passes.quantize_gptq.format={kind: coded, rat: 3}", ["rat", "did you mean 'rate'?"]),
        ("report.prompt=''", ["report.prompt: '' is not valid"]),
        ("model.checkpoint=x", ["model", "exactly one"]),
        ("data.text=nowhere.txt", ["data.text: 'nowhere.txt' does not exist"]),
        ("nonsense", ["--set nonsense", "path.to.field=value"]),
        ("=3", ["--set =3", "path.to.field=value"]),
        ("seed=[1", ["--set seed=[1", "not valid YAML"]),
        ("name.x=1", ["--set name.x=1", "no fields above"]),
        ("variants.v.passes.5.sparsity=1", ["'5' is no entry"]),
        ("variants.v.passes.distill=1", ["'distill' is no entry"]),
        ("variants.v.passes=7", ["variants.v.passes: 7 is not valid"]),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_work(refuse, override, words):
    line = refuse("--set", override)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: [", ["tiny.yaml:", "not valid YAML"]),
        ("- train", ["a recipe is a mapping"]),
        ("name: tiny", ["model", "required"]),
        ("name: tiny\nname: big", ["tiny.yaml:2", "'name' is given twice"]),
        ("name: tiny\nmodel: {}", ["exactly one"]),
        ("name: tiny\nmodel: llama", ["model: 'llama' is not valid"]),
    ],
)
def test_a_file_that_is_no_recipe(refuse, recipe, content, words):
    recipe.write_text(content)
    line = refuse()
    assert all(word in line for word in words), line


def test_an_unknown_recipe(tmp_path):
    assert "did you mean 'demo'?" in refused("run", "dmo", "-o", tmp_path / "run")
    assert "give a checkpoint (or --model PATH)" in refused("run", "smollm2", "-o", tmp_path / "run")
    assert not tree(tmp_path)


@pytest.mark.parametrize(
    "options",
    [("--text", "t" * 5000), ("--text", "a/" * 5000), ("--model", "m" * 300), ("--labelled", "r" * 5000)],
)
def test_a_name_that_no_file_can_have_is_told_in_a_short_line(recipe, tmp_path, options):
    line = refused("run", recipe, *options, "-o", tmp_path / "run")
    assert "is too long for the name of a file; shorten it" in line
    assert len(line) < 300


def test_an_unusable_text(refuse, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n')
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "none").mkdir()
    for name, words in {
        "latin.txt": "is not UTF-8",
        "bad.jsonl": "bad.jsonl:1",
        "blank.txt": "holds no text",
        "none": "holds no .txt",
    }.items():
        assert words in refuse("--text", tmp_path / name)
    assert "does not exist" in refuse("--set", f"data.calibration_text={tmp_path / 'gone.txt'}")


def only_the_source(folder: Path) -> bool:
    """Whether no pass has run, and nothing is half-written."""
    return len(list((folder / ".steps").iterdir())) == 1 and not list(folder.rglob("*.partial"))


def test_a_text_too_short_for_the_windows(recipe, tmp_path):
    line = refused("run", recipe, "-o", tmp_path / "run", *settings("data.evaluation_windows=9000"))
    assert "data.evaluation_windows: 9000 windows of 32 tokens need 288000 tokens" in line
    line = refused("run", recipe, "-o", tmp_path / "run", *settings("data.calibration_windows=8000"))
    assert "data.calibration_windows: 8000 windows" in line
    assert only_the_source(tmp_path / "run")


def test_calibration_text_that_overlaps_the_evaluation_text(recipe, text, tmp_path):
    line = refused("run", recipe, "-o", tmp_path / "run", *settings(f"data.calibration_text={text}"))
    assert "data.calibration_text:" in line
    assert "also in the calibration text" in line
    assert only_the_source(tmp_path / "run")


def test_text_is_refused_before_the_first_pass_even_if_no_pass_reads_it(recipe, tmp_path):
    only_rounding = "variants={r: [quantize_round]}"
    line = refused(
        "run", recipe, "-o", tmp_path / "run",
        *settings("base=[prune_magnitude]", only_rounding, "data.evaluation_windows=9000"),
    )  # fmt: skip
    assert "data.evaluation_windows" in line
    assert only_the_source(tmp_path / "run")


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def test_weights_that_are_not_whole(refuse, copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for length, words in [
        (len(whole) - 5, "header promises"),
        (100, "header of"),
        (3, "truncated or damaged"),
    ]:
        cut(weights, length)
        line = refuse("--model", copy)
        assert words in line
        assert "model.safetensors" in line
    weights.write_bytes(struct.pack("<Q", 9) + b"{not json" + whole[17:])
    assert "unreadable safetensors header" in refuse("--model", copy)
    weights.unlink()
    assert "no weights (model.safetensors)" in refuse("--model", copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    assert "part-1.safetensors: named by model.safetensors.index.json but missing" in refuse("--model", copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../part.safetensors"}}')
    assert "lies outside it" in refuse("--model", copy)


def test_pickled_weights(refuse, copy, tmp_path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    line = refuse("--model", copy)
    assert "pytorch_model.bin: pickled weights are refused" in line
    assert "safetensors" in line
    assert "pickled weights are refused" in refuse("--model", copy / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code(refuse, copy, name):
    content = json.loads((copy / name).read_text())
    (copy / "modeling.py").write_text("raise SystemExit('ran code of a checkpoint')")
    content["auto_map"] = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    (copy / name).write_text(json.dumps(content))
    line = refuse("--model", copy)
    assert f"{name}: 'auto_map' asks for remote code, which is never run" in line


def test_a_directory_or_name_that_is_no_model(refuse, copy, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refuse("--model", tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be loaded" in refuse("--model", "nobody/nothing-of-this-name")
    assert "gone" in refuse("--model", tmp_path / "gone")
    assert "model: 'gone' is neither a directory" in refuse("--model", "gone")  # and no hub was asked
    (copy / "config.json").write_text("{")
    assert "config.json: not readable as JSON" in refuse("--model", copy)
    (copy / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "unheard_of" in refuse("--model", copy)


def test_a_tokenizer_that_is_missing_or_broken(recipe, copy, tmp_path):
    (copy / "tokenizer.json").write_text("{")
    assert "cannot be loaded" in refused("run", recipe, "-o", tmp_path / "run", "--model", copy)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    assert "cannot be loaded" in refused("run", recipe, "-o", tmp_path / "run", "--model", copy)
    assert set(tree(tmp_path / "run")) == {"recipe.yaml", ".lock"}


def test_a_gguf_file_that_is_not_whole(refuse, tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((256, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = file.read_bytes()
    for length in (len(whole) - 1000, 60, 6):
        cut(file, length)
        line = refuse("--model", file)
        assert "model.gguf: truncated" in line
        file.write_bytes(whole)
    file.write_bytes(b"PK\x03\x04" + whole[4:])
    assert "no GGUF file" in refuse("--model", file)


def test_an_output_folder_that_is_somebodys_own(refuse, recipe, tmp_path, text):
    """A recipe and a folder `base` beside it are no run, whatever the recipe is called."""
    folder = tmp_path / "run"
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "notes.txt").write_text("years of work")
    shutil.copy(recipe, folder / "recipe.yaml")
    assert "holds files that are no run" in refuse()
    (folder / ".steps").mkdir()
    assert "base: is in the way" in refused("run", recipe, "-o", folder, "--no-measure")
    (folder / "recipe.yaml").unlink()  # as where a run's folder is deleted, and its last step put there
    assert "base: is in the way" in refused("run", recipe, "-o", folder, "--no-measure")
    assert (folder / "base" / "notes.txt").read_text() == "years of work"


def test_two_runs_in_one_folder(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    with alone(tmp_path / "run"):
        assert "another run is using it" in refused("run", recipe, "-o", tmp_path / "run")


def test_an_output_folder_that_holds_something_else(refuse, recipe, tmp_path, text):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    assert "holds files that are no run" in refuse()
    (folder / "thesis.tex").unlink()
    (folder / ".steps").mkdir()
    write_recipe(folder / "recipe.yaml", text, name="other")
    line = refuse()
    assert "holds the run 'other', not 'tiny'" in line
    assert "--output" in line
    (folder / "recipe.yaml").write_text("[")
    assert "holds files that are no run" in refuse()
    shutil.rmtree(folder)
    folder.write_text("a file")
    assert "is a file" in refuse()


def test_an_output_that_cannot_be_written(refuse, recipe, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file")
    below_a_file = tmp_path / "file" / "run"
    for arguments in (
        ["run", recipe, "-o", below_a_file],
        ["run", recipe, "-o", below_a_file, "--dry-run"],
        ["compare", tmp_path, "-o", below_a_file],
        ["bench", checkpoint, "-o", below_a_file],
    ):
        assert "file/run: cannot be written" in refused(*arguments)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser, too, runs tests
    assert "run: cannot be written" in refuse()


def test_commands_on_what_is_not_there(checkpoint, tmp_path):
    gone = tmp_path / "gone"
    assert "gone: no such artifact" in refused("bench", checkpoint, gone)
    assert "gone: no such artifact" in refused("bench", checkpoint, "--base", gone)
    assert "gone" in refused("bench", checkpoint, "--text", gone)
    assert "no recipe.yaml, so this is no run" in refused("compare", tmp_path)
    assert "tokenizer cannot be loaded" in refused("bench", tmp_path)
    assert "gone" in refused("generate", gone, "--prompt", "a")
    assert "this is no artifact" in refused("generate", tmp_path, "--prompt", "a")
    assert "prompt: is empty" in refused("generate", checkpoint, "--prompt", "")
    assert "the model takes at most 128" in refused("generate", checkpoint, "--prompt", "a b c " * 99)
    assert "did you mean 'quantize_gptq'?" in refused("passes", "quantise_gptq")


def test_bench_settings_out_of_range(checkpoint, text):
    assert "window: 4 is not valid" in refused("bench", checkpoint, "--text", text, "--window", 4)
    line = refused("bench", checkpoint, "--text", text, "--window", 129)
    assert "window: 129 tokens, but" in line
    assert "takes at most 128" in line
    assert "threads: 0 is not valid" in refused("bench", checkpoint, "--text", text, "--threads", 0)
    line = refused("bench", checkpoint, "--text", text, "--window", 32, "--windows", 90000)
    assert "evaluation_windows: 90000 windows" in line


def test_a_disk_that_is_too_small(refuse, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "are needed, 0.0 GB are free; free some space" in refuse()


def test_a_memory_that_is_too_small(refuse, monkeypatch):
    monkeypatch.setattr("compress.run.preflight.available_memory_bytes", lambda: 1000)
    assert "of memory are needed" in refuse()
