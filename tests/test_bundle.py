"""Bundles: what an artifact holds, who can load it, and what is refused."""

import json

import pytest
import torch
from training_set import equal, tiny_bundle, weights
from transformers import AutoModelForCausalLM

from compress.artifact.bundle import Bundle
from compress.artifact.counts import parameter_counts, weight_bytes, weight_file_bytes
from compress.artifact.folder import CODES, MANIFEST
from compress.errors import UserError
from compress.formats import Int4, QuantizedLinear
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_round import QuantizeRound


@pytest.fixture
def quantized(bundle, make_context):
    return QuantizeRound(format=Int4(group=16))(bundle, make_context(bundle))


def edit(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    content.pop("seal", None)  # of a manifest: as if it had been written so
    path.write_text(json.dumps(content))


def test_a_float_artifact_loads_with_stock_transformers(bundle, tmp_path):
    bundle.save(tmp_path / "artifact")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, bundle.model(ids).logits)
    assert json.loads((tmp_path / "artifact" / "config.json").read_text())["architectures"]


def test_stock_transformers_never_fills_an_artifact_of_codes_with_random_weights(quantized, tmp_path):
    quantized.save(tmp_path / "artifact")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")


def test_what_was_loaded_is_saved_again_to_the_same_bytes(quantized, tmp_path):
    first = quantized.save(tmp_path / "first")
    second = Bundle.load(tmp_path / "first").save(tmp_path / "second")
    assert first.files[CODES] == second.files[CODES]
    assert first.layers == second.layers


def test_a_tied_head_is_stored_and_counted_once(make_context, tmp_path):
    sizes, counts = [], []
    for tied in (True, False):
        bundle = tiny_bundle(tie_embeddings=tied)
        result = QuantizeRound()(bundle, make_context(bundle))
        result.save(tmp_path / f"{tied}")
        sizes.append(weight_bytes(result.model))
        counts.append(parameter_counts(result.model)[0])
        assert counts[-1] == sum(p.numel() for p in bundle.model.parameters())
        assert sizes[-1] == pytest.approx(weight_file_bytes(tmp_path / f"{tied}"), abs=8000)  # the header
    assert counts[1] - counts[0] == 300 * 32
    assert sizes[1] - sizes[0] == 300 * 32 + 300 * 2  # codes, and a float16 scale per row


def test_zeros_are_counted(bundle, make_context):
    pruned = PruneMagnitude(sparsity=0.5)(bundle, make_context(bundle))
    total, nonzero = parameter_counts(pruned.model)
    assert total - nonzero == pruned.notes["removed"]


def test_masks_travel_through_disk(tmp_path, make_context):
    for family in ("llama", "gpt2"):  # GPT-2 stores its matrices the other way round
        bundle = tiny_bundle(family=family)
        pruned = PruneMagnitude(pattern="2:4")(bundle, make_context(bundle))
        pruned.save(tmp_path / family)
        loaded = Bundle.load(tmp_path / family)
        assert loaded.masks.keys() == pruned.masks.keys()
        assert all(torch.equal(loaded.masks[name], mask) for name, mask in pruned.masks.items())
        assert Bundle.load(tmp_path / family, masks=False).masks == {}


def test_biases_stay_with_codes(make_context, tmp_path):
    bundle = tiny_bundle(family="gpt2")
    with torch.no_grad():
        bundle.model.transformer.h[0].mlp.c_fc.bias += torch.arange(64)
    QuantizeRound()(bundle, make_context(bundle)).save(tmp_path / "artifact")
    layer = Bundle.load(tmp_path / "artifact").model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(layer.bias, torch.arange(64.0))


def test_a_clone_shares_nothing_that_can_change(bundle):
    before = weights(bundle)
    clone = bundle.clone()
    with torch.no_grad():
        for parameter in clone.model.parameters():
            parameter += 1
    assert equal(before, weights(bundle))


def test_saving_replaces_what_was_there_and_leaves_no_scratch(bundle, tmp_path):
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "old").write_text("x")
    bundle.save(folder)
    assert not (folder / "old").exists()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_exports_travel_with_the_bundle(bundle, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.onnx").write_bytes(b"graph")
    bundle.evolve(exports={"onnx": tmp_path / "export"}).save(tmp_path / "artifact")
    assert (tmp_path / "artifact" / "onnx" / "model.onnx").read_bytes() == b"graph"
    assert Bundle.load(tmp_path / "artifact").exports == {"onnx": tmp_path / "artifact" / "onnx"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), None])
def test_a_failed_save_leaves_the_old_artifact(bundle, tmp_path, monkeypatch, error):
    bundle.save(tmp_path / "artifact")
    before = (tmp_path / "artifact" / MANIFEST).read_bytes()

    def fail(folder):
        raise error or ValueError("a bug")

    monkeypatch.setattr(bundle.tokenizer, "save_pretrained", fail)
    with pytest.raises(UserError if error else ValueError, match="No space left|a bug"):
        bundle.save(tmp_path / "artifact")
    assert (tmp_path / "artifact" / MANIFEST).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


class TestRefusals:
    @pytest.fixture
    def folder(self, quantized, tmp_path):
        quantized.save(tmp_path / "artifact")
        return tmp_path / "artifact"

    def test_a_file_of_another_size(self, folder):
        with (folder / "tokenizer.json").open("a") as stream:
            stream.write(" ")
        with pytest.raises(UserError, match=r"tokenizer\.json: missing or not of the \d+ bytes"):
            Bundle.load(folder)

    def test_a_missing_file(self, folder):
        (folder / CODES).unlink()
        with pytest.raises(UserError, match=r"quantized\.safetensors: missing or not of the \d+ bytes"):
            Bundle.load(folder)

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
    def test_a_manifest_that_leaves_the_folder(self, folder, name):
        (folder.parent / "secret").write_text("s")
        edit(folder / MANIFEST, files={name: {"bytes": 1, "sha256": ""}})
        with pytest.raises(UserError, match=r"refers to .* which lies outside it"):
            Bundle.load(folder)

    def test_codes_that_do_not_match_the_manifest(self, folder):
        layers = json.loads((folder / MANIFEST).read_text())["layers"]
        layers.pop("model.layers.0.mlp.up_proj")
        edit(folder / MANIFEST, layers=layers)
        with pytest.raises(UserError, match=r"does not match its manifest \('model\.layers\.0\.mlp\.up_proj"):
            Bundle.load(folder)

    @pytest.mark.parametrize("change", [{"group": 32}, {"symmetric": True}])
    def test_a_format_that_the_codes_are_not_of(self, folder, change):
        layers = json.loads((folder / MANIFEST).read_text())["layers"]
        layers["model.layers.0.mlp.up_proj"]["format"].update(change)
        edit(folder / MANIFEST, layers=layers)
        with pytest.raises(UserError, match="does not match its manifest"):
            Bundle.load(folder)

    def test_a_layer_that_is_no_table_of_embeddings(self, folder):
        layers = json.loads((folder / MANIFEST).read_text())["layers"]
        layers["model.layers.0.mlp.up_proj"]["embedding"] = True
        edit(folder / MANIFEST, layers=layers)
        with pytest.raises(UserError, match=r"does not match .*'model\.layers\.0\.mlp\.up_proj' is no table"):
            Bundle.load(folder)

    def test_a_layer_that_the_model_has_not(self, folder):
        layers = json.loads((folder / MANIFEST).read_text())["layers"]
        layers["model.layers.9.mlp.up_proj"] = layers["model.layers.0.mlp.up_proj"]
        edit(folder / MANIFEST, layers=layers)
        with pytest.raises(UserError, match="does not match its manifest"):
            Bundle.load(folder)

    def test_a_format_nobody_knows(self, folder):
        layers = json.loads((folder / MANIFEST).read_text())["layers"]
        layers["model.layers.0.mlp.up_proj"]["format"] = {"kind": "int7"}
        edit(folder / MANIFEST, layers=layers)
        with pytest.raises(UserError, match="no known format"):
            Bundle.load(folder)

    @pytest.mark.parametrize("text", ["{", '{"kind": "huggingface"}', "[]"])
    def test_a_broken_manifest(self, folder, text):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: not a Manifest of this version"):
            Bundle.load(folder)

    def test_an_onnx_artifact(self, folder):
        edit(folder / MANIFEST, kind="onnx")
        with pytest.raises(UserError, match="an ONNX artifact; torch needs the folder it was exported from"):
            Bundle.load(folder)

    def test_remote_code(self, folder):
        edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config"})
        edit(folder / MANIFEST, files={})
        with pytest.raises(UserError, match=r"config\.json: 'auto_map' asks for remote code"):
            Bundle.load(folder)

    def test_an_architecture_nobody_knows(self, folder):
        edit(folder / "config.json", model_type="abacus")
        edit(folder / MANIFEST, files={})
        with pytest.raises(UserError, match=r"config\.json: no model can be made of it.*abacus"):
            Bundle.load(folder)
