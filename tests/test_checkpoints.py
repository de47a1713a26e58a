"""Somebody else's files: every way in which one is refused, and that whole ones load."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_set import equal, tiny_bundle, weights

from compress.artifact.bundle import Bundle
from compress.errors import MissingExtra, UserError
from compress.host.tensor_files import entries
from compress.models import checkpoints
from compress.models.checkpoints import load_checkpoint, load_tokenizer, meta_model


@pytest.fixture
def folder(bundle, tmp_path):
    """A whole Hugging Face directory in one file."""
    bundle.model.save_pretrained(tmp_path / "model")
    bundle.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(bundle, tmp_path):
    """One in several files with an index."""
    bundle.model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    bundle.tokenizer.save_pretrained(tmp_path / "sharded")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    return tmp_path / "sharded"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(source, match):
    with pytest.raises(UserError, match=match) as caught:
        load_checkpoint(source)
    assert "\n" not in str(caught.value)


class TestDirectories:
    def test_whole_ones_load_as_float32(self, bundle, folder, sharded):
        for place in (folder, sharded):
            loaded = Bundle.load(place)
            assert equal(weights(loaded), weights(bundle))
            assert loaded.lineage.source == str(place)
        bundle.model.bfloat16().save_pretrained(folder)
        assert load_checkpoint(folder)[0].dtype == torch.float32

    def test_the_layout_of_the_hubs_cache_loads(self, bundle, sharded, tmp_path):
        snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
        snapshot.mkdir(parents=True)
        sharded.rename(blobs)
        for blob in blobs.iterdir():
            (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
        assert equal(weights(Bundle.load(snapshot)), weights(bundle))

    def test_nothing_there(self, tmp_path):
        refused(tmp_path / "absent", "is neither a directory, a .gguf file nor a hub id")
        refused("absent", r"model: 'absent' is neither")

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        refused(folder, r"no config\.json, so this is no model directory")

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_a_broken_config(self, folder, text):
        (folder / "config.json").write_text(text)
        refused(folder, r"config\.json: (not readable as JSON|a JSON object was expected)")

    def test_an_architecture_nobody_knows(self, folder):
        edit(folder / "config.json", model_type="abacus")
        refused(folder, "cannot be loaded: .*abacus")

    @pytest.mark.parametrize(
        ("field", "value"),
        [("hidden_size", "abc"), ("num_hidden_layers", [1]), ("num_attention_heads", 0), ("vocab_size", -1)],
    )
    def test_a_configuration_with_a_wrong_value(self, folder, field, value):
        edit(folder / "config.json", **{field: value})
        said = "cannot be loaded: .+|vocab_size: -1 is no count"
        refused(folder, said)
        with pytest.raises(UserError, match=said):  # the preflight says so too
            meta_model(str(folder))

    @pytest.mark.parametrize("name", ["BertForNextSentencePrediction", "BertForMultipleChoice"])
    def test_a_model_that_writes_no_text(self, folder, name):
        edit(folder / "config.json", architectures=[name])
        refused(folder, f"architectures: {name} is neither a decoder nor an encoder-decoder")

    def test_a_matrix_that_is_not_in_the_file(self, folder):
        tensors = load_file(folder / "model.safetensors")
        gone = next(name for name in tensors if "down_proj" in name)
        save_file({k: v for k, v in tensors.items() if k != gone}, folder / "model.safetensors")
        refused(folder, rf"no weights for '{gone}', which would be random")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
    def test_pickles(self, folder, name):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps({}))
        refused(folder, rf"{name}: pickled weights are refused.*convert the checkpoint to safetensors")

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        refused(folder, r"no weights \(model\.safetensors\)")

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_remote_code(self, folder, name):
        edit(folder / name, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
        (folder / "modeling_evil.py").write_text("raise SystemExit('it ran')\n")
        refused(folder, rf"{name}: 'auto_map' asks for remote code, which is never run.*'llama'")

    @pytest.mark.parametrize("left", [0, 4, 100, -1])
    def test_truncated_safetensors(self, folder, left):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:left])
        refused(folder, r"model\.safetensors: .*truncated or damaged; copy or download it again")

    def test_a_missing_shard(self, sharded):
        gone = sorted(sharded.glob("model-*.safetensors"))[1]
        gone.unlink()
        refused(sharded, rf"{gone.name}: named by model\.safetensors\.index\.json but missing")

    @pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd"])
    def test_an_index_that_leaves_the_folder(self, sharded, name):
        (sharded.parent / "other.safetensors").write_bytes(b"x")
        edit(sharded / "model.safetensors.index.json", weight_map={"lm_head.weight": name})
        refused(sharded, f"refers to '{name}', which lies outside it")

    @pytest.mark.parametrize("value", [None, ["a"], {"w": 3}])
    def test_an_index_without_a_map(self, sharded, value):
        edit(sharded / "model.safetensors.index.json", weight_map=value)
        refused(sharded, "no 'weight_map' that names files")

    def test_an_encoder_is_no_decoder(self, folder):
        from transformers import ViTConfig

        ViTConfig(intermediate_size=64).save_pretrained(folder)
        refused(folder, "cannot be loaded")

    def test_a_hub_id_that_cannot_be_had(self, monkeypatch):
        import transformers

        def offline(*args, **options):
            assert options["trust_remote_code"] is False
            assert options["use_safetensors"] is True
            assert options["revision"] == "c0ffee"
            raise OSError("We couldn't connect to the hub\nCheck your connection")

        monkeypatch.setattr(
            transformers.AutoConfig, "from_pretrained", lambda *_, **__: transformers.LlamaConfig()
        )
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", offline)
        monkeypatch.setattr(checkpoints, "hub_revision", lambda source: "c0ffee")
        refused("owner/name", r"model: 'owner/name' cannot be loaded: We couldn't connect to the hub$")


class TestSafetensors:
    @pytest.mark.parametrize(
        "header",
        [b"[]", b"{", b'{"w": {}}', b'{"w": {"data_offsets": [0, 9]}}', b'{"w": 1}', b"\xff\xfe"],
    )
    def test_headers_that_lie(self, tmp_path, header):
        file = tmp_path / "w.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(UserError, match="truncated or damaged"):
            entries(file)

    def test_a_length_beyond_the_file(self, tmp_path):
        file = tmp_path / "w.safetensors"
        file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
        with pytest.raises(UserError, match=f"header of {2**62} bytes in a file of 10"):
            entries(file)

    def test_none_at_all(self, tmp_path):
        with pytest.raises(UserError, match="no such file"):
            entries(tmp_path / "w.safetensors")


def write_gguf(path: Path) -> Path:
    """A small but real Llama in GGUF, with a tokenizer of bytes."""
    from gguf import GGUFWriter

    bundle = tiny_bundle()
    config, state = bundle.model.config, bundle.model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    merges = json.loads(bundle.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    vocabulary = sorted(bundle.tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, tensor in state.items():
        if name == "lm_head.weight":  # tied
            continue
        stem = name.removeprefix("model.").removesuffix(".weight")
        layer, _, inner = stem.removeprefix("layers.").partition(".")
        target = f"blk.{layer}.{names[inner]}" if stem.startswith("layers.") else names[stem]
        writer.add_tensor(f"{target}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestGguf:
    @pytest.fixture
    def file(self, tmp_path):
        return write_gguf(tmp_path / "model.gguf")

    def test_a_whole_one_loads_and_can_be_saved(self, file, tmp_path):
        loaded = Bundle.load(file)
        assert loaded.model.dtype == torch.float32
        assert loaded.model.config.num_hidden_layers == 4
        expected = tiny_bundle().model.model.layers[2].mlp.up_proj.weight
        assert torch.equal(loaded.model.model.layers[2].mlp.up_proj.weight, expected)
        loaded.save(tmp_path / "artifact")
        assert equal(weights(Bundle.load(tmp_path / "artifact")), weights(loaded))

    def test_its_tokenizer_alone(self, file):
        assert load_tokenizer(file).get_vocab() == tiny_bundle().tokenizer.get_vocab()
        assert load_tokenizer(str(file)).get_vocab() == tiny_bundle().tokenizer.get_vocab()

    @pytest.mark.parametrize("left", [4, 30, 3000, -4000, -1])
    def test_a_truncated_one(self, file, left):
        file.write_bytes(file.read_bytes()[:left])
        refused(file, r"model\.gguf: truncated")
        with pytest.raises(UserError, match="truncated"):  # the preflight says so too
            meta_model(str(file))

    def test_a_file_that_is_none(self, tmp_path):
        (tmp_path / "notes.txt").write_text("notes")
        refused(tmp_path / "notes.txt", r"notes\.txt: no GGUF file \(it begins with b'note'\)")
        (tmp_path / "empty.gguf").write_bytes(b"")
        refused(tmp_path / "empty.gguf", r"no GGUF file")

    @pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt"])
    def test_a_pickle(self, tmp_path, name):
        (tmp_path / name).write_bytes(pickle.dumps({}))
        refused(tmp_path / name, f"{name}: pickled weights are refused")

    def test_without_the_package(self, file, monkeypatch):
        monkeypatch.setattr("compress.models.gguf_files.find_spec", lambda name: None)
        with pytest.raises(MissingExtra, match=r"model\.gguf needs the package 'gguf': pip install gguf"):
            load_checkpoint(file)


def test_a_shape_costs_no_memory(folder):
    model = meta_model(str(folder))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with pytest.raises(UserError, match="does not exist; give a folder"):
        meta_model(str(folder / "absent"))


def test_transformers_settings_are_put_back(folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_checkpoint(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
