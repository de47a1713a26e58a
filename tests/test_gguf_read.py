"""GGUF files are the model and the tokenizer that llama.cpp makes of them, or are refused by name."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import export_models
import numpy as np
import pytest
import torch
import training_set
from gguf import GGUFWriter

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.export.gguf.artifact import write_gguf
from compress.export.gguf.check import llama_logits
from compress.models.checkpoints import load_tokenizer, meta_model
from compress.models.gguf_tokenizer import WORDS

WITH_LLAMA = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0}
SCALED = {
    "published": dict(LLAMA3, factor=32.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    "short": dict(LLAMA3, factor=8.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "nobody's": dict(LLAMA3, factor=5.0, high_freq_factor=9.0, original_max_position_embeddings=1000),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "own head": ("llama", {"tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    **{name: ("llama", {"rope_parameters": rotary, "head_dim": 64}) for name, rotary in SCALED.items()},
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
TEXT = (
    "def alpha(x): return x + 3 ** 12345 != 1_000.5\n\n\n\tnaïve  Größe 'll 'S we'LL  don't\r\n"
    " 数字は123と４５６ ½ — «mañana» a😀b ...?! $x^2|y~z` <=> \t \n  trailing   CamelCaseWord HTTPServer \n"
)


def tiny(family: str, **changes: Any) -> Bundle:
    export_models.MODELS["gguf_read"] = (
        family.capitalize(),
        {"intermediate_size": 96, "vocab_size": 300, "eos_token_id": 0, "initializer_range": 0.3}
        | {"tie_word_embeddings": True}
        | changes,
    )
    model = export_models.tiny_model("gguf_read")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return training_set.tiny_bundle().evolve(model=model)


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype("int64"))).logits.numpy()


def written(tmp_path: Path, name: str, **more: Any) -> tuple[Bundle, Path]:
    family, changes = MODELS[name]
    bundle, file = tiny(family, **changes), tmp_path / "model.gguf"
    write_gguf(bundle, file, floats="float32", **more)
    return bundle, file


def rewritten(file: Path, changes: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    """The same file with other metadata, or more of it, and more tensors."""
    from gguf import GGUFReader, GGUFValueType

    reader = GGUFReader(file)
    writer = GGUFWriter(file.with_name("changed.gguf"), "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in changes:
            kinds = field.types
            inner = kinds[1] if kinds[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=inner)
    for name, value in changes.items():
        if value is not None:
            kind = {str: "STRING", float: "FLOAT32", int: "UINT32", bool: "BOOL"}[type(value)]
            writer.add_key_value(name, value, GGUFValueType[kind])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.with_name("changed.gguf")


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "float64"])
@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "output_norm.weight"])
def test_numbers_that_are_no_weights_are_refused_by_the_tensors_name(kind, name, tmp_path, monkeypatch):
    _, file = written(tmp_path, "plain")
    add = GGUFWriter.add_tensor

    def typed(self, which, data, **more):
        add(self, which, data.astype(kind)) if which == name else add(self, which, data, **more)

    monkeypatch.setattr(GGUFWriter, "add_tensor", typed)
    file = rewritten(file, {})
    short = {"i": "I", "f": "F"}[kind[0]] + kind.strip("intfloa")
    for open_ in (Bundle.load, lambda file: meta_model(str(file))):
        with pytest.raises(UserError, match=rf"changed\.gguf: '{name}' holds {short}, which nothing"):
            open_(file)


class TestModel:
    @pytest.mark.parametrize("name", MODELS)
    def test_float32_in_is_float32_out(self, name, tmp_path):
        bundle, file = written(tmp_path, name)
        found, ids = Bundle.load(file), export_models.tokens(2, 64)
        expected = logits(bundle.model, ids)
        assert np.abs(logits(found.model, ids) - expected).max() <= 1e-4 * np.abs(expected).max()
        found.save(tmp_path / "saved")
        again = Bundle.load(tmp_path / "saved")
        assert np.array_equal(logits(again.model, ids), logits(found.model, ids))

    @WITH_LLAMA
    @pytest.mark.parametrize("name", MODELS)
    def test_it_is_what_llama_cpp_computes(self, name, tmp_path):
        _, file = written(tmp_path, name)
        ids = export_models.tokens(2, 64)
        expected = np.stack(llama_logits(file, ids, 1))
        # llama.cpp keeps keys and values as float16
        assert np.abs(logits(Bundle.load(file).model, ids) - expected).max() <= 0.02 * np.abs(expected).max()

    @WITH_LLAMA
    def test_linear_scaling_is_read(self, tmp_path):
        _, file = written(tmp_path, "plain")
        file = rewritten(file, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
        ids = export_models.tokens(2, 64)
        expected = np.stack(llama_logits(file, ids, 1))
        found = Bundle.load(file).model
        assert found.config.rope_parameters["rope_type"] == "linear"
        assert np.abs(logits(found, ids) - expected).max() <= 0.02 * np.abs(expected).max()

    @WITH_LLAMA
    def test_a_name_decides_nothing(self, tmp_path):
        _, file = written(tmp_path, "mistral")
        file = rewritten(file, {"general.name": "mistral"})  # as this package once wrote
        ids = export_models.tokens(2, 64)
        expected = np.stack(llama_logits(file, ids, 1))
        found = Bundle.load(file)
        assert np.abs(logits(found.model, ids) - expected).max() <= 0.02 * np.abs(expected).max()
        assert found.tokenizer(TEXT)["input_ids"] == training_set.tiny_bundle().tokenizer(TEXT)["input_ids"]

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rope.scaling.type", "yarn"),
            ("attention.scale", 0.3),
            ("logit_scale", 8.5),
            ("expert_count", 4),
            ("attention.value_length", 8),
            ("rope.dimension_count", 8),
            ("attention.sliding_window", 16),
            ("a_key_of_tomorrow", 1),
        ],
    )
    def test_a_key_that_nobody_reads_is_refused(self, key, value, tmp_path):
        _, file = written(tmp_path, "plain")
        file = rewritten(file, {f"llama.{key}": value})
        for load in (Bundle.load, meta_model):  # the preflight says so too
            with pytest.raises(UserError, match=rf"changed\.gguf: llama\.{key}: {value} is not read here"):
                load(str(file))

    def test_keys_that_ask_for_nothing_pass(self, tmp_path):
        bundle, file = written(tmp_path, "plain")
        file = rewritten(
            file,
            {"llama.rope.scaling.type": "none", "llama.attention.causal": True, "llama.expert_count": 0,
             "general.url": "somewhere", "llama.rope.freq_base": None},
        )  # fmt: skip
        ids = export_models.tokens(1, 32)
        assert np.allclose(logits(Bundle.load(file).model, ids), logits(bundle.model, ids), atol=1e-4)

    def test_a_tensor_without_a_place_is_refused(self, tmp_path):
        _, file = written(tmp_path, "plain")
        more = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
        file = rewritten(file, {}, more)
        for load in (Bundle.load, meta_model):
            with pytest.raises(UserError, match=r"nothing in LlamaForCausalLM takes .*'blk\.0\.attn_q_norm"):
                load(str(file))

    def test_factors_that_no_setting_gives_are_refused(self, tmp_path):
        _, file = written(tmp_path, "plain")
        factors = np.array([1, 2, 1, 3, 1, 4, 1, 5], np.float32)
        file = rewritten(file, {}, {"rope_freqs.weight": factors})
        with pytest.raises(UserError, match=r"factors in 'rope_freqs\.weight' are not those of Llama 3"):
            meta_model(str(file))

    def test_an_adapter_and_a_piece_are_refused(self, tmp_path):
        _, file = written(tmp_path, "plain")
        with pytest.raises(UserError, match=r"general\.type: 'adapter' is no model"):
            Bundle.load(rewritten(file, {"general.type": "adapter"}))
        with pytest.raises(UserError, match="one of 3 pieces"):
            Bundle.load(rewritten(file, {"split.count": 3}))


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, Any]:
    """A byte-level BPE whose merges cross every border between words, so that borders are seen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [TEXT[i : i + 40] for i in range(len(TEXT))],
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    names = sorted(model["vocab"], key=model["vocab"].get)
    # one that no merge makes
    return {"tokens": [*names, "Ġtrailing"], "merges": [" ".join(pair) for pair in model["merges"]]}


def words_file(folder: Path, vocabulary: dict[str, Any], pre: str | None, **more: bool) -> Path:
    """A GGUF with this vocabulary, whose text is cut in the way called `pre`."""
    model = tiny("llama", vocab_size=len(vocabulary["tokens"]), num_hidden_layers=1)
    write_gguf(model, folder / "model.gguf", floats="float16")
    from gguf import GGUFReader

    reader = GGUFReader(folder / "model.gguf")
    file = folder / f"{pre}.gguf"
    writer = GGUFWriter(file, "llama")
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_tokenizer_model("llama" if "scores" in vocabulary else "gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary.get("types", [3] + [1] * (len(vocabulary["tokens"]) - 1)))
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
        writer.add_unk_token_id(0)
    else:
        writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(1 if "scores" in vocabulary else 0)
    writer.add_eos_token_id(2 if "scores" in vocabulary else 0)
    for name, value in more.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@WITH_LLAMA
class TestWords:
    @pytest.mark.parametrize("pre", [*WORDS, None])
    def test_text_is_cut_as_llama_cpp_cuts_it(self, pre, vocabulary, tmp_path):
        from llama_cpp import Llama

        file = words_file(tmp_path, vocabulary, pre)
        llama = Llama(str(file), vocab_only=True, verbose=False)
        expected = llama.tokenize(TEXT.encode(), add_bos=True)
        llama.close()
        tokenizer = load_tokenizer(file)
        assert tokenizer(TEXT)["input_ids"] == expected
        tokenizer.save_pretrained(tmp_path / "saved")
        meta_model(str(file)).config.save_pretrained(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved")(TEXT)["input_ids"] == expected

    def test_ways_differ(self, vocabulary, tmp_path):
        found = {
            pre: tuple(load_tokenizer(words_file(tmp_path, vocabulary, pre))(TEXT)["input_ids"])
            for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "default")
        }
        assert len(set(found.values())) == len(found)

    def test_an_unknown_way_is_refused(self, vocabulary, tmp_path):
        with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre: 'poro-chat' is a way to cut"):
            load_tokenizer(words_file(tmp_path, vocabulary, "poro-chat"))


@WITH_LLAMA
@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_space_before_a_text_is_as_the_file_says(prefix, tmp_path):
    from llama_cpp import Llama

    pieces = ["\u2581a", "ab", "\u2581ab", "\u2581\u2581", *"abcx\u2581", *(f"[{i}]" for i in range(32))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    vocabulary = {"tokens": tokens, "scores": scores, "types": [2, 3, 3] + [6] * 256 + [1] * len(pieces)}
    file = words_file(tmp_path, vocabulary, None, **({} if prefix is None else {"add_space_prefix": prefix}))
    llama = Llama(str(file), vocab_only=True, verbose=False)
    tokenizer = load_tokenizer(file)
    tokenizer.save_pretrained(tmp_path / "saved")
    meta_model(str(file)).config.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for text in ("ab ab  xab", " ab\n", "cab", "é ab"):
        ids = tokenizer(text)["input_ids"]
        assert ids == llama.tokenize(text.encode(), add_bos=True), text
        assert again(text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    llama.close()
