"""Files that are not what was written are refused; a loaded model is not its files any more."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import invoke, refused
from export_models import exported, tokens
from export_models import tiny_bundle as tiny_export
from hostile_files import said
from safetensors.torch import load_file, save_file
from training_set import documents, equal, weights

from compress import api
from compress.artifact import bundle as bundles
from compress.artifact import integrity
from compress.artifact.bundle import Bundle
from compress.artifact.folder import CODES, MANIFEST
from compress.artifact.integrity import SUMS
from compress.errors import UserError
from compress.export.gguf.artifact import write_gguf
from compress.export.onnx.artifact import write_manifest
from compress.host.mapped import mapped_files
from compress.host.steady import Steady
from compress.measure.turns import Target
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_round import QuantizeRound
from compress.records.manifest import Manifest
from compress.run.recipe import Recipe
from compress.runtimes import open_runtime, verify_artifact
from compress.text.windows import DataConfig


def flip(file, at=-5):
    """One bit of a file, in place, and its time of change another."""
    with file.open("r+b") as stream:
        stream.seek(at, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(at, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("stream", [False, True])
def test_a_flipped_bit_is_refused_and_loads_on_demand(stream, bundle, tmp_path):
    bundle.save(tmp_path / "a")
    flip(tmp_path / "a" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"model\.safetensors: is not what was written .*verify=False"
    ) as told:
        Bundle.load(tmp_path / "a", stream=stream)
    assert "\n" not in str(told.value)
    Bundle.load(tmp_path / "a", stream=stream, verify=False)


def test_codes_and_settings_are_checked_too(bundle, make_context, tmp_path):
    QuantizeRound()(bundle, make_context(bundle)).save(tmp_path / "a")
    for name in (CODES, "config.json", "tokenizer.json"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        flip(tmp_path / name / name)
        with pytest.raises(UserError, match=rf"{name}: is not what was written"):
            Bundle.load(tmp_path / name)


def test_a_manifest_is_what_was_written(bundle, make_context, tmp_path):
    PruneMagnitude(sparsity=0.3)(bundle, make_context(bundle)).save(tmp_path / "a")
    file = tmp_path / "a" / MANIFEST
    whole = json.loads(file.read_text())
    assert Manifest.read(file).masked
    rest = {name: value for name, value in whole.items() if name != "seal"}
    assert whole["seal"] == hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**whole, "masked": whole["masked"][1:]}))
    assert "manifest.json: is not what was written" in said(Bundle.load, tmp_path / "a")
    assert len(Bundle.load(tmp_path / "a", verify=False).masks) == len(whole["masked"]) - 1
    for name in ("", "model", "model.layers.9.mlp.up_proj"):  # that of no layer
        file.write_text(json.dumps({**whole, "masked": [name, *whole["masked"]]}))
        for stream in (False, True):
            line = said(lambda at, s=stream: Bundle.load(at, verify=False, stream=s), tmp_path / "a")
            assert f"'{name}' is masked, and no layer of the model" in line
    for other in (rest, dict(reversed(list(whole.items())))):  # an older one; the same in another order
        file.write_text(json.dumps(other))
        assert len(Bundle.load(tmp_path / "a").masks) == len(whole["masked"])


def test_hashes_are_those_of_sha256_and_a_file_is_read_once(bundle, tmp_path, monkeypatch):
    manifest = bundle.save(tmp_path / "a")
    for name, record in manifest.files.items():
        assert record.sha256 == hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest()
    monkeypatch.setattr(integrity, "sha256_of", lambda file: pytest.fail(f"{file} is read again"))
    Bundle.load(tmp_path / "a")


def test_an_onnx_folder_is_checked_when_it_is_opened(tmp_path):
    model = tiny_export("llama")
    exported(model, tmp_path / "onnx")
    write_manifest(model, tmp_path / "onnx", {"task": "causal"})
    open_runtime(tmp_path / "onnx", "onnxruntime", 1)
    with (tmp_path / "onnx" / "model.onnx_data").open("ab") as stream:
        stream.write(b"\0" * 32)
    for place in (tmp_path / "onnx", tmp_path):  # a variant's folder holds it, too
        with pytest.raises(UserError, match=r"model\.onnx_data: missing or not of the"):
            open_runtime(place, "onnxruntime", 1)
    open_runtime(tmp_path, "onnxruntime", 1, verify=False)


def test_exports_without_a_manifest_get_a_list_that_sha256sum_reads(bundle, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.bin").write_bytes(b"graph")
    saved = bundle.evolve(exports={"coreml": tmp_path / "made"})
    saved.save(tmp_path / "a")
    line = f"{hashlib.sha256(b'graph').hexdigest()}  model.bin\n"
    assert (tmp_path / "a" / "coreml" / SUMS).read_text() == line
    integrity.verify(tmp_path / "a" / "coreml")
    flip(tmp_path / "a" / "coreml" / "model.bin", -1)
    for path in (tmp_path / "a" / "coreml", tmp_path / "a" / "coreml" / "model.bin"):
        with pytest.raises(UserError, match=r"model\.bin: is not what was written"):
            integrity.verify(path)


def test_a_gguf_is_held_against_the_line_that_names_it(bundle, tmp_path):
    file, sums = tmp_path / "model.gguf", tmp_path / SUMS
    write_gguf(bundle, file)
    integrity.write_sums(tmp_path)
    before = weights(Bundle.load(file))
    flip(file)
    with pytest.raises(UserError, match=r"model\.gguf: is not what was written") as told:
        Bundle.load(file)
    assert "\n" not in str(told.value)
    changed = weights(Bundle.load(file, verify=False))
    assert not equal(changed, before)
    # somebody's folder: lists of other files, of this one in other forms, and what is called as ours are
    digest, other = hashlib.sha256(file.read_bytes()).hexdigest(), "0" * 64
    (tmp_path / MANIFEST).write_text('{"schemaVersion": 2}')
    for fine in (
        f"{other}  another.gguf\n",
        f"# made by hand\n\n{other} *parts/model.gguf\n{digest.upper()}  ./model.gguf\n",
        f"SHA256 (another.gguf) = {other}\nSHA256 (model.gguf) = {digest}\n",
    ):
        sums.write_text(fine)
        assert equal(weights(Bundle.load(file)), changed)
    for wrong in (f"{other}  ./model.gguf\n", f"SHA256 (model.gguf) = {other}\n"):
        sums.write_text(wrong)
        assert "model.gguf: is not what was written" in said(Bundle.load, file)


@pytest.mark.parametrize("stream", [False, True])
def test_somebodys_list_is_of_the_files_that_are_there(stream, bundle, tmp_path):
    bundle.save(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    integrity.write_sums(tmp_path / "a")
    with (tmp_path / "a" / SUMS).open("a") as lines:
        lines.write("0" * 64 + "  pytorch_model.bin\n")  # not downloaded
    assert equal(weights(Bundle.load(tmp_path / "a")), weights(bundle))
    flip(tmp_path / "a" / "model.safetensors")
    assert "model.safetensors: is not what was written" in said(Bundle.load, tmp_path / "a", stream=stream)


@pytest.mark.parametrize(
    "content", ["nonsense", "{}", '{"files": {"../x": {"bytes": 1, "sha256": ""}}}', "["]
)
def test_a_list_that_cannot_be_read_is_told(content, tmp_path):
    name = SUMS if content == "nonsense" else MANIFEST
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        integrity.verify(tmp_path)


def test_the_commands_refuse_and_can_be_told_not_to(bundle, tmp_path):
    bundle.save(tmp_path / "a")
    file = tmp_path / "a" / "generation_config.json"
    file.write_bytes(file.read_bytes().replace(b"\n", b" "))  # as long, and means the same
    os.utime(file, ns=(0, 1))
    assert "generation_config.json: is not what was written" in refused(
        "generate", tmp_path / "a", "-p", "def", "--tokens", 2
    )
    done = invoke("generate", tmp_path / "a", "-p", "def", "--tokens", 2, "--no-verify")
    assert done.code == 0, done.err
    assert "--no-verify" in invoke("bench", "--help").out


def test_a_float_artifact_that_was_changed_is_measured_on_demand(bundle, tmp_path):
    bundle.save(tmp_path / "a")
    flip(tmp_path / "a" / "model.safetensors")
    (tmp_path / "text.txt").write_text("".join(document.text for document in documents()))
    data = DataConfig(text=str(tmp_path / "text.txt"), window=32, evaluation_windows=4)
    with pytest.raises(UserError, match=r"model\.safetensors: is not what was written"):
        api.bench([tmp_path / "a"], data)
    (result,) = api.bench([tmp_path / "a"], data, verify=False)
    assert result.nll > 0


def test_a_step_with_a_flipped_bit_is_done_again(recipe_dict, tmp_path):
    recipe_dict["base"] = []
    recipe_dict["variants"] = {"pruned": [{"prune_magnitude": {"sparsity": 0.5}}]}
    recipe, said = Recipe.parse(recipe_dict, "test"), []
    made = api.make_artifacts(recipe, tmp_path / "run", said.append)
    file = made.folder / "pruned" / "model.safetensors"
    before = file.read_bytes()
    flip(file)  # a hard link to the step's
    api.make_artifacts(recipe, tmp_path / "run", said.append)
    assert file.read_bytes() == before
    assert any("done again, since a file is not what was written" in line for line in said)


def test_a_worker_does_not_hash(bundle, tmp_path, monkeypatch):
    from compress.measure.worker import Worker

    bundle.save(tmp_path / "a")
    monkeypatch.setattr(integrity, "fault", lambda *given: pytest.fail("hashed where it is timed"))
    Worker("torch", 1, lambda: None).load(str(tmp_path / "a"))
    assert Target("a", "torch", tmp_path / "a").runtime == "torch"


@pytest.mark.parametrize("kind", ["float", "codes"])
def test_a_loaded_model_is_not_the_file(kind, bundle, make_context, tmp_path):
    made = bundle if kind == "float" else QuantizeRound()(bundle, make_context(bundle))
    made.save(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    loaded = Bundle.load(tmp_path / "a")
    assert not any(str(file) in name for _, _, name in mapped_files(".safetensors") or ())
    before = {name: tensor.clone() for name, tensor in weights(loaded).items()}
    with file.open("r+b") as stream:  # in place
        stream.seek(-4096, os.SEEK_END)
        stream.write(b"\x55" * 4096)
    assert equal(weights(loaded), before)
    file.write_bytes(b"")  # a mapped page would now be a SIGBUS
    assert equal(weights(loaded), before)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight if kind == "float" else 1


def test_what_is_read_block_by_block_must_not_change(bundle, tmp_path):
    bundle.save(tmp_path / "a")
    streamed = Bundle.load(tmp_path / "a", stream=True)
    flip(tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: was changed while"):
        streamed.offload(tmp_path / "parts", whole=True)


def test_a_graph_that_is_mapped_must_not_change(tmp_path):
    runtime = exported(tiny_export("llama"), tmp_path / "onnx")
    runtime.logits(tokens(1, 4))
    flip(tmp_path / "onnx" / "model.onnx_data")
    with pytest.raises(UserError, match=r"model\.onnx_data: was changed while"):
        runtime.logits(tokens(1, 4))


def test_a_file_that_another_took_the_place_of_lives_on(tmp_path):
    (tmp_path / "a").write_text("one")
    opened, named = Steady([tmp_path / "a"]), Steady([tmp_path / "a"], by_name=True)
    (tmp_path / "b").write_text("two")
    (tmp_path / "b").replace(tmp_path / "a")
    opened.require()
    with pytest.raises(UserError, match="was changed while"):
        named.require()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("codes", [False, True])
def test_integers_where_floats_are_wanted_are_refused_by_name(stream, codes, bundle, make_context, tmp_path):
    made = QuantizeRound(embeddings=None)(bundle, make_context(bundle)) if codes else bundle
    made.save(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    state = load_file(file)
    name = "model.embed_tokens.weight"
    damaged = {**state, name: state[name].float().view(torch.int32).clone()}
    save_file(damaged, file, metadata={"format": "pt"})
    if codes:
        manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
        manifest["files"][CODES]["bytes"] = file.stat().st_size
        (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    else:
        (tmp_path / "a" / MANIFEST).unlink()  # somebody else's
    with pytest.raises(UserError, match=rf"'{name}' is stored as (I32|torch\.int32)"):
        Bundle.load(tmp_path / "a", stream=stream, verify=False)


def test_another_shape_is_refused_before_a_block_is_read(bundle, tmp_path):
    bundle.save(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    file = tmp_path / "a" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 48}))
    for stream in (True, False):
        with pytest.raises(UserError, match="48") as told:
            Bundle.load(tmp_path / "a", stream=stream)
        assert "\n" not in str(told.value)


def test_what_does_not_come_back_is_not_saved(bundle, make_context, tmp_path, monkeypatch):
    real = bundles.save_file

    def zeroed(state, file, **more):
        real({name: torch.zeros_like(t) if "embed" in name else t for name, t in state.items()}, file, **more)

    monkeypatch.setattr(bundles, "save_file", zeroed)
    with pytest.raises(UserError, match="does not come back as it was written"):
        QuantizeRound()(bundle, make_context(bundle)).save(tmp_path / "a")
    assert not list(tmp_path.glob("a*"))


def test_a_large_artifact_is_compared_by_its_headers(bundle, make_context, tmp_path, monkeypatch):
    from compress.artifact import reopened

    monkeypatch.setattr(reopened, "_WHOLE", 0)
    bundle.save(tmp_path / "float")
    QuantizeRound()(bundle, make_context(bundle)).save(tmp_path / "codes")
    real = bundles.save_file
    monkeypatch.setattr(
        bundles, "save_file", lambda state, file, **more: real(dict(list(state.items())[1:]), file, **more)
    )
    manifest = Manifest.read(tmp_path / "codes" / MANIFEST)
    with pytest.raises(UserError, match="lacks"):
        QuantizeRound()(bundle, make_context(bundle)).save(tmp_path / "less")
    assert manifest.layers


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda place: place.symlink_to("nowhere")])
def test_a_manifest_that_is_no_file_is_not_taken_for_none(make, bundle, tmp_path):
    bundle.save(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    make(tmp_path / "a" / MANIFEST)
    for load in (
        Bundle.load,
        lambda at: Bundle.load(at, stream=True),
        lambda at: Bundle.load(at, verify=False),
        lambda at: verify_artifact(at, "torch"),
    ):
        with pytest.raises(UserError, match=r"manifest\.json"):
            load(tmp_path / "a")
