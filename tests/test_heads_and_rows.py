"""A head tied to the embedding that has a bias of its own; tokens that the embedding has no row for."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from training_set import tiny_context

import compress
from compress.artifact.bundle import Bundle
from compress.artifact.folder import MANIFEST
from compress.errors import UserError
from compress.generation.generator import TextGenerator
from compress.generation.text import rows_of
from compress.measure.artifacts import evaluation_windows
from compress.passes.prune_wanda import PruneWanda
from compress.passes.quantize_round import QuantizeRound
from compress.records.manifest import Manifest
from compress.text.windows import DataConfig

IDS = torch.arange(3, 40)[None]
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "ModernBertForMaskedLM": {
        "local_attention": 16,
        **{f"{n}_token_id": 2 for n in ("cls", "sep", "bos", "eos")},
    },
    "ElectraForMaskedLM": {"embedding_size": 64},
    "DistilBertForMaskedLM": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
    "BertForMaskedLM": {},
    "PhiForCausalLM": {"tie_word_embeddings": True},
}
STEPS = {"round": QuantizeRound(format="int8"), "wanda": PruneWanda(sparsity=0.01)}


def with_tokens(bundle, add):
    """The bundle with a tokenizer of its own that has more."""
    tokenizer = copy.deepcopy(bundle.tokenizer)
    add(tokenizer)
    return bundle.evolve(tokenizer=tokenizer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_keeps_its_bias(kind, stream, bundle, tmp_path):
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SIZES, **KINDS[kind]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        right = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "m")
    bundle.tokenizer.save_pretrained(tmp_path / "m")
    for name, step in STEPS.items():
        given = Bundle.load(tmp_path / "m", stream=stream)
        assert (given.shards is not None) == stream
        (tmp_path / name).mkdir()
        step(given, tiny_context(bundle, tmp_path / name)).save(tmp_path / f"out-{name}")
        with torch.no_grad():
            found = Bundle.load(tmp_path / f"out-{name}").model(input_ids=IDS).logits
        assert (found - right).norm() < 0.05 * right.norm()


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_beyond_the_rows_is_told_with_both_numbers(stream, bundle, tmp_path):
    more = with_tokens(bundle, lambda tokenizer: tokenizer.add_tokens(["import ", "self."]))
    coded = QuantizeRound()(bundle, tiny_context(bundle, tmp_path))
    told = r"token 301 of its tokenizer \('self\.'\) is beyond the model's 300 rows"
    for place, made in (("float", bundle), ("codes", coded)):
        made.save(tmp_path / place)
        more.tokenizer.save_pretrained(tmp_path / place)
        (tmp_path / place / MANIFEST).write_text(without_files(tmp_path / place / MANIFEST))
        with pytest.raises(UserError, match=told):
            Bundle.load(tmp_path / place, stream=stream)
        with pytest.raises(UserError, match=told):  # and is not written
            made.evolve(tokenizer=more.tokenizer).save(tmp_path / "again")


def without_files(manifest):
    """A manifest that states nothing of its files."""
    return Manifest.read(manifest).model_copy(update={"files": {}}).model_dump_json()


def test_a_token_to_pad_with_may_lack_its_row(bundle, tmp_path):
    bundle = with_tokens(bundle, lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}))
    assert bundle.tokenizer.pad_token_id == 300
    bundle.save(tmp_path / "m")
    assert Bundle.load(tmp_path / "m").model.get_input_embeddings().num_embeddings == 300


@pytest.mark.parametrize(
    ("settings", "rows"),
    [({"vocab_size": 7}, 7), ({"text_config": {"vocab_size": 8}}, 8), ({"text_config": [9]}, None)],
)
def test_rows_are_read_where_a_configuration_tells_them(settings, rows, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert rows_of(tmp_path) == rows


def test_a_special_beyond_the_rows_may_stand_in_no_text(bundle, tmp_path):
    padded = with_tokens(bundle, lambda t: t.add_special_tokens({"pad_token": "<padding>"}))
    padded.save(tmp_path / "model")  # nobody reads it
    (tmp_path / "clean.txt").write_text("def add(a, b):\n    return a + b\n" * 200, encoding="utf-8")
    whole = (tmp_path / "clean.txt").read_text(encoding="utf-8")
    (tmp_path / "dirty.txt").write_text(whole.replace("add", "<padding>"), encoding="utf-8")
    calls = {
        "apply": lambda text: compress.load(tmp_path / "model").apply(compress.QuantizeGPTQ(), text=text),
        "measure": lambda text: evaluation_windows(tmp_path / "model", DataConfig(text=text, window=16)),
        "prompt": lambda text: TextGenerator(tmp_path / "model").encode(Path(text).read_text()[:40]),
    }
    for call in calls.values():
        call(str(tmp_path / "clean.txt"))
        with pytest.raises(UserError, match="holds '<padding>', token 300, and the model has 300 rows"):
            call(str(tmp_path / "dirty.txt"))
