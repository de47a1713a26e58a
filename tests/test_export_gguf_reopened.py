"""What a GGUF file says besides its tensors is read again by the step that wrote it."""

import pytest
from gguf import GGUFWriter
from test_export_gguf import LLAMA3, coded, tiny

from compress.export.gguf.artifact import write_gguf
from compress.export.gguf.reopened import check_reopens
from compress.export.onnx.check import ExportCheckFailed
from compress.formats import Int8
from compress.passes.export_gguf import ExportGguf


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
        ("mistral", {"sliding_window": None, "head_dim": 32}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_what_was_written_of_every_family_opens(family, changes, tmp_path):
    bundle = coded(tiny(family, **changes), Int8())
    write_gguf(bundle, tmp_path / "model.gguf")
    check_reopens(bundle, tmp_path / "model.gguf", None)
    write_gguf(bundle, tmp_path / "named.gguf", split="a-name-of-tomorrow")
    check_reopens(bundle, tmp_path / "named.gguf", "a-name-of-tomorrow")


@pytest.mark.parametrize(
    ("method", "change", "told"),
    [
        ("add_head_count", lambda n: n * 2, "does not open again|heads"),
        ("add_head_count_kv", lambda n: n * 2, "does not open again|heads of keys"),
        ("add_block_count", lambda n: n - 1, "does not open again|blocks 3 where the model has 4"),
        ("add_context_length", lambda n: n * 2, "the file says context 128 where the model has 64"),
        ("add_feed_forward_length", lambda n: n + 32, "width of the MLP 96 where the model has 64"),
        ("add_layer_norm_rms_eps", lambda e: e * 10, "epsilon of norms"),
        ("add_rope_freq_base", lambda f: f * 2, "frequencies of positions"),
        ("add_rope_dimension_count", lambda n: n // 2, "does not open again"),
        ("add_vocab_size", lambda n: n + 4, "tokens 304 where the model has 300|does not open"),
        ("add_tokenizer_pre", lambda name: "llama-bpe" if name != "llama-bpe" else "gpt-2", "cuts"),
        ("add_token_list", lambda t: [*t[:40], t[41], t[40], *t[42:]], "has token 40"),
        ("add_token_merges", lambda merges: merges[:-20], "tokens"),
        ("add_eos_token_id", lambda n: n + 7, "eos_token_id"),
    ],
)  # fmt: skip
def test_a_wrong_word_in_the_metadata_is_refused_by_the_step(
    method, change, told, bundle, make_context, monkeypatch
):
    real = getattr(GGUFWriter, method)
    monkeypatch.setattr(GGUFWriter, method, lambda self, value: real(self, change(value)))
    # where llama.cpp is not installed
    monkeypatch.setattr("compress.export.gguf.check.check_llama_cpp", lambda *given: None)
    with pytest.raises(ExportCheckFailed, match=f"export_gguf: .*({told})") as caught:
        ExportGguf()(bundle, make_context(bundle))
    assert "\n" not in str(caught.value)
