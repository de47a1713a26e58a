"""GGUF files: blocks that mean what the codes mean, and a file that two readers agree on."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import export_models
import numpy as np
import pytest
import torch
import training_set
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.export.gguf.artifact import interleaved, write_gguf
from compress.export.gguf.blocks import block_type, blocks, refusal
from compress.export.gguf.check import check_file, check_llama_cpp, llama_logits
from compress.export.gguf.tokenizer import CONTROL, split_name, vocabulary
from compress.export.onnx.check import ExportCheckFailed
from compress.formats import Activations, Int2, Int3, Int4, Int5, Int6, Int8, Nf4, QuantizedTensor
from compress.passes.export_gguf import ExportGguf

WITH_LLAMA = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed; it is built from source"
)
TYPES = {
    Int2(group=32, symmetric=True): "Q4_0",
    Int3(group=32, symmetric=True): "Q4_0",
    Int4(group=32, symmetric=True): "Q4_0",
    Int4(group=64, symmetric=True): "Q4_0",
    Int4(group=None, symmetric=True): "Q4_0",
    Int5(group=32, symmetric=True): "Q5_0",
    Int6(group=64, symmetric=True): "Q8_0",
    Int8(): "Q8_0",
    Int8(group=32): "Q8_0",
    Int6(group=32): "Q8_0",
    Int2(group=64): "Q4_1",
    Int3(group=32): "Q4_1",
    Int4(group=64): "Q4_1",
    Int4(group=None): "Q4_1",
    Int5(group=32): "Q5_1",
}
# hidden and MLP widths are multiples of 32 but not of 64 throughout: the last group of a row is short
SIZES = {"intermediate_size": 96}
LLAMA3 = export_models.MODELS["llama3_rope"][1]["rope_parameters"]


def named(format: Any) -> str:
    return f"{format.kind}-{format.group}-{'sym' if format.symmetric else 'asym'}"


def tiny(family: str = "llama", **changes: Any) -> Bundle:
    """A tiny random model of a family with a byte-level BPE."""
    export_models.MODELS["gguf"] = (
        family.capitalize(),
        {**SIZES, "vocab_size": 300, "tie_word_embeddings": True, "eos_token_id": 0, **changes},
    )
    model = export_models.tiny_model("gguf")
    return training_set.tiny_bundle().evolve(model=model)


def coded(bundle: Bundle, format: Any, embeddings: Any = None) -> Bundle:
    return export_models.quantized(bundle, format, embeddings)


def dense(file: Path) -> dict[str, torch.Tensor]:
    """The file's tensors in float32."""
    return {
        t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).astype(np.float32))
        for t in GGUFReader(file).tensors
    }


def read_by_transformers(file: Path) -> Bundle:
    return Bundle.load(file)


class TestBlocks:
    @pytest.mark.parametrize("format", TYPES, ids=named)
    def test_mean_what_the_codes_mean(self, format):
        weight = QuantizedTensor.round(format, torch.randn(24, 96))
        kind, data = blocks("x", weight, widen=True)
        assert kind == TYPES[format] == block_type(format, widen=True)
        found = torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]))
        expected = weight.dequantize()
        if not kind.endswith("_1"):
            assert torch.equal(found, expected)
            return
        width = format.group_width(96)
        steps = weight.grid.scales.repeat_interleave(width, 1)[:, :96]
        error = (found - expected).abs() / steps
        assert error.max() <= (format.levels - 1) / 2048 + 1e-6
        assert error.max() > 0 or format.bits == 2

    @given(st.integers(0, 2**32 - 1), st.sampled_from(list(TYPES)), st.floats(-6, 4))
    def test_every_code_and_scale_survives(self, seed, format, exponent):
        generator = torch.Generator().manual_seed(seed)
        weight = QuantizedTensor.round(format, torch.randn(3, 64, generator=generator) * 10.0**exponent)
        kind, data = blocks("x", weight, widen=True)
        found = torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]))
        largest = (format.levels - 1) * weight.grid.scales.abs().max() / 2048 + 2.0**-25
        assert (found - weight.dequantize()).abs().max() <= (largest if kind.endswith("_1") else 0)

    def test_zero_points_that_are_powers_of_two_are_exact(self):
        weight = QuantizedTensor.round(Int4(group=32), torch.randn(4, 32))
        weight.zeros = torch.full_like(weight.zeros, 0x08)
        kind, data = blocks("x", weight)
        assert torch.equal(
            torch.from_numpy(dequantize(data, GGMLQuantizationType[kind])), weight.dequantize()
        )

    def test_rows_can_be_put_in_another_order(self):
        weight = QuantizedTensor.round(Int4(group=32), torch.randn(8, 64))
        order = torch.randperm(8)
        assert np.array_equal(blocks("x", weight, order)[1], blocks("x", weight)[1][order.numpy()])

    def test_what_has_no_type_is_refused(self):
        assert "multiple of 32" in str(refusal(Int4(group=16)))
        assert "symmetric: true" in str(refusal(Int8(symmetric=False)))
        assert "use int4" in str(refusal(Nf4(), widen=True))
        for format in (Int2(), Int3(), Int6()):
            assert "widen: true" in str(refusal(format))
        with pytest.raises(UserError, match="x: GGUF has no type for int3"):
            blocks("x", QuantizedTensor.round(Int3(), torch.randn(4, 64)))
        with pytest.raises(UserError, match="48 wide"):
            blocks("x", QuantizedTensor.round(Int8(), torch.randn(4, 48)))
        weight = QuantizedTensor.round(Int4(group=32), torch.randn(4, 32))
        weight.scales.fill_(60000.0)
        weight.zeros.fill_(15)
        with pytest.raises(UserError, match="minima beyond float16"):
            blocks("x", weight)


class TestTokenizer:
    def test_tokens_types_and_merges_are_those_of_the_tokenizer(self, bundle):
        words = vocabulary(bundle.tokenizer, 303)
        assert words.split == "gpt-2"
        assert {t: i for i, t in enumerate(words.tokens[:300])} == bundle.tokenizer.get_vocab()
        assert words.types[0] == CONTROL
        assert words.tokens[302] == "[unused 302]"
        content = json.loads(bundle.tokenizer.backend_tokenizer.to_str())
        assert list(words.merges) == [" ".join(pair) for pair in content["model"]["merges"]]
        assert words.special == {"bos": 0, "eos": 0, "pad": 0}
        assert not words.add_bos
        assert not words.add_eos

    @pytest.mark.parametrize(
        ("steps", "name"),
        [
            ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "gpt-2"),
            (
                [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
                ],
                "smollm",
            ),
        ],
    )
    def test_splits_are_recognised(self, steps, name):
        assert (
            split_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {}}) == name
        )

    def test_other_tokenizers_are_refused(self, bundle):
        with pytest.raises(UserError, match="byte-level BPE"):
            vocabulary(export_models.tiny_bundle("llama").tokenizer, 97)
        with pytest.raises(UserError, match="only 100 embeddings"):
            vocabulary(bundle.tokenizer, 100)
        with pytest.raises(UserError, match="set pre_tokenizer"):
            split_name({"pre_tokenizer": {"type": "Whitespace"}, "model": {}})


class TestFile:
    @pytest.mark.parametrize(
        "format", [Int4(group=32, symmetric=True), Int4(group=64), Int8(), Int5(group=32)]
    )
    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_transformers_reads_the_same_model(self, family, format, tmp_path):
        bundle = coded(tiny(family), format, Int8())
        facts = write_gguf(bundle, tmp_path / "model.gguf", floats="float32")
        checked = check_file(bundle, tmp_path / "model.gguf")
        loaded = read_by_transformers(tmp_path / "model.gguf")
        ids = torch.from_numpy(export_models.tokens(4, 32).astype("int64"))
        with torch.no_grad():
            expected, found = bundle.model(ids).logits, loaded.model(ids).logits
        exact = format.symmetric
        assert (checked["largest_rounding_of_minima_in_steps"] == 0) == exact
        assert (found - expected).norm() <= (1e-6 if exact else 0.01) * expected.norm()
        assert facts["tensors"]["Q8_0"] == (15 if format.kind == "int8" else 1)
        assert loaded.model.config.tie_word_embeddings
        assert loaded.tokenizer.get_vocab() == bundle.tokenizer.get_vocab()
        assert loaded.tokenizer("def alpha(x)")["input_ids"] == bundle.tokenizer("def alpha(x)")["input_ids"]

    def test_a_head_of_its_own_is_written(self, tmp_path):
        bundle = coded(tiny(tie_word_embeddings=False), Int4(group=32, symmetric=True), Int8())
        write_gguf(bundle, tmp_path / "model.gguf")
        found = dense(tmp_path / "model.gguf")
        assert torch.equal(found["output.weight"], bundle.model.lm_head.weight)
        assert torch.equal(found["token_embd.weight"], bundle.model.model.embed_tokens.weight)
        assert not torch.equal(found["output.weight"], found["token_embd.weight"])

    def test_float_matrices_are_float16_and_norms_float32(self, tmp_path):
        bundle = tiny()
        facts = write_gguf(bundle, tmp_path / "model.gguf")
        assert facts["tensors"] == {"F16": 15, "F32": 5}
        found = dense(tmp_path / "model.gguf")
        assert torch.equal(found["output_norm.weight"], bundle.model.model.norm.weight)
        down = bundle.model.model.layers[1].mlp.down_proj.weight
        assert torch.equal(found["blk.1.ffn_down.weight"], down.half().float())
        check_file(bundle, tmp_path / "model.gguf")

    def test_query_rows_are_paired_as_llama_cpp_turns_them(self, tmp_path):
        bundle = coded(tiny(), Int8())
        write_gguf(bundle, tmp_path / "model.gguf")
        query = bundle.model.model.layers[0].self_attn.q_proj.weight  # 4 heads of 16
        found = dense(tmp_path / "model.gguf")["blk.0.attn_q.weight"]
        for head in range(4):
            for i in range(8):
                assert torch.equal(found[16 * head + 2 * i], query[16 * head + i])
                assert torch.equal(found[16 * head + 2 * i + 1], query[16 * head + i + 8])
        assert sorted(interleaved(3, 8).tolist()) == list(range(24))

    def test_llama3_positions_become_factors(self, tmp_path):
        bundle = tiny(rope_parameters=LLAMA3)
        write_gguf(bundle, tmp_path / "model.gguf")
        factors = dense(tmp_path / "model.gguf")["rope_freqs.weight"]
        plain = 10000.0 ** -(torch.arange(8) / 8)
        assert torch.allclose(plain / factors, bundle.model.model.rotary_emb.inv_freq, rtol=1e-6)
        assert 1.0 < factors[0] < 8.0
        assert factors[-1] == pytest.approx(8.0)  # the lowest frequencies are divided by the whole factor

    def test_rounded_inputs_are_refused(self, tmp_path):
        bundle = coded(tiny(), Int8())
        bundle.model.model.layers[0].mlp.up_proj.activations = Activations(mode="dynamic")
        with pytest.raises(UserError, match="round their inputs"):
            write_gguf(bundle, tmp_path / "model.gguf")

    def test_the_same_model_gives_the_same_bytes(self, tmp_path):
        for name in ("first", "second"):
            write_gguf(coded(tiny(), Int8()), tmp_path / name)
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()

    def test_the_check_sees_a_changed_byte(self, tmp_path):
        bundle = coded(tiny(), Int4(group=32))
        file = tmp_path / "model.gguf"
        write_gguf(bundle, file)
        tensor = next(t for t in GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
        data = bytearray(file.read_bytes())
        data[int(tensor.data_offset) + 9] ^= 0x10
        file.write_bytes(data)
        with pytest.raises(ExportCheckFailed, match=r"blk\.1\.ffn_up\.weight"):
            check_file(bundle, file)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("gpt2", "model_type 'gpt2'"), ("mistral_window", "sliding_window: 7")],
    )
    def test_what_llama_cpp_does_not_describe_is_refused_before_any_work(self, name, message):
        with pytest.raises(UserError, match=message):
            ExportGguf().layers(export_models.tiny_bundle(name).model)


class TestPass:
    def test_refuses_formats_beforehand(self):
        step = ExportGguf()
        assert step.refuses((Int4(group=64), Int8())) is None
        assert "multiple of 32" in str(step.refuses((Int8(), Int4(group=48))))
        assert "int6" in str(step.refuses((Int6(), Int8())))
        assert ExportGguf(widen=True).refuses((Int6(), Int3())) is None

    def test_names_the_extra_it_lacks(self, bundle, monkeypatch):
        monkeypatch.setattr("compress.passes.export_gguf.find_spec", lambda name: None)
        with pytest.raises(UserError, match="gguf"):
            ExportGguf().layers(bundle.model)

    def test_writes_checks_and_travels(self, bundle, make_context, tmp_path):
        result = ExportGguf()(coded(bundle, Int4(group=32), Int8()), make_context(bundle))
        facts = result.notes["gguf"]
        assert facts["tensors"] == {"Q8_0": 1, "F32": 9, "Q4_1": 28}
        assert 0 < facts["check"]["largest_rounding_of_minima_in_steps"] <= 15 / 2048 + 1e-6
        assert (facts["llama_cpp"] is None) == (find_spec("llama_cpp") is None)
        result.save(tmp_path / "artifact")
        assert set(Bundle.load(tmp_path / "artifact").exports) == {"gguf"}
        assert (tmp_path / "artifact" / "gguf" / "model.gguf").stat().st_size == facts["file_bytes"]


@WITH_LLAMA
class TestLlamaCpp:
    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("llama", {}),
            ("llama", {"attention_bias": True, "mlp_bias": True}),
            ("llama", {"rope_parameters": LLAMA3}),
            ("mistral", {"sliding_window": None, "head_dim": 32}),
            ("qwen2", {}),
            ("qwen3", {"head_dim": 32}),
        ],
    )
    def test_float32_files_give_torch_logits(self, family, changes, tmp_path):
        bundle = tiny(family, **changes)
        write_gguf(bundle, tmp_path / "model.gguf", floats="float32")
        windows = export_models.tokens(2, 32)
        found = llama_logits(tmp_path / "model.gguf", windows, 1)
        expected = export_models.torch_logits(bundle.model, windows)
        # llama.cpp keeps keys and values as float16
        assert np.abs(np.stack(found) - expected).max() <= 5e-3 * np.abs(expected).max()

    @pytest.mark.parametrize(
        "format", [Int4(group=32, symmetric=True), Int4(group=64), Int5(group=32), Int8()]
    )
    def test_codes_differ_by_rounded_activations_only(self, format, tmp_path):
        bundle = coded(tiny(initializer_range=0.1), format, Int8())
        write_gguf(bundle, tmp_path / "model.gguf")
        facts = check_llama_cpp(bundle.model, tmp_path / "model.gguf", export_models.tokens(4, 32), 1)
        assert facts is not None
        assert facts["kl"] < 0.01
        assert facts["nll_llama_cpp"] == pytest.approx(facts["nll_torch"], abs=0.05)

    def test_tokens_are_those_of_the_tokenizer(self, tmp_path):
        from llama_cpp import Llama

        bundle = tiny()
        write_gguf(bundle, tmp_path / "model.gguf")
        llama = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
        text = "def alpha(x): return x + 3\n\tnaïve  Größe 12345 'll"
        found = llama.tokenize(text.encode(), add_bos=False)
        llama.close()
        assert found == bundle.tokenizer(text)["input_ids"]
