"""New models of four families, tokenizers of three kinds: stock classes, their vocabularies and specials."""

import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from training_set import equal

import compress
from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.models.checkpoints import load_checkpoint, meta_model
from compress.models.create import PRESETS, Architecture, create
from compress.models.create_tokenizers import train_tokenizer
from compress.records.manifest import Lineage
from compress.tasks.registry import task_of
from compress.text.documents import Document
from compress.text.framing import Frame, frame_of
from compress.text.windows import DataConfig, prepare

TEXT = [Document(m.__name__, inspect.getsource(m)) for m in (json.decoder, json.encoder, inspect)]
CLASSES = {
    "llama": ("LlamaForCausalLM", "causal"),
    "gpt2": ("GPT2LMHeadModel", "causal"),
    "bert": ("BertForMaskedLM", "masked"),
    "t5": ("T5ForConditionalGeneration", "seq2seq"),
}
KINDS = ("bpe", "wordpiece", "unigram")


def tiny(family: str, **changes: Any) -> Architecture:
    sizes: dict[str, Any] = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 64, "context": 64}
    sizes |= {"kv_heads": 1} if family == "llama" else {"sentinels": 10} if family == "t5" else {}
    return Architecture.model_validate(
        {"family": family, "preset": "1m", "vocab_size": 700, **sizes, **changes}
    )


def made(family: str, seed: int = 0, **changes: Any) -> Bundle:
    return Bundle(*create(tiny(family, **changes), TEXT, seed), Lineage(source="tiny"))


@pytest.fixture(scope="module", params=list(CLASSES))
def family(request: pytest.FixtureRequest) -> Any:
    """(family, model and tokenizer of its usual kind)."""
    return request.param, made(request.param)


@pytest.mark.parametrize("family", PRESETS)
@pytest.mark.parametrize(("preset", "millions"), [("1m", 1), ("3m", 3), ("10m", 10), ("30m", 30)])
def test_a_preset_has_about_the_parameters_of_its_name(family, preset, millions):
    architecture = Architecture(family=family, preset=preset)
    assert architecture.vocab_size == 2048
    parameters = sum(p.numel() for p in meta_model(architecture.config()).parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.18)  # measured: 0.89 to 1.16 of the name
    assert architecture.shape.hidden % 64 == architecture.shape.intermediate % 64 == 0


def test_stock_classes_that_everybody_loads(family, tmp_path):
    name, bundle = family
    kind, task = CLASSES[name]
    assert type(bundle.model) is getattr(transformers, kind)
    assert bundle.model.config.architectures == [kind]
    assert task_of(bundle.model.config).name == task
    bundle.model.save_pretrained(tmp_path)
    bundle.tokenizer.save_pretrained(tmp_path)
    ids = bundle.tokenizer("def scan(self):\n    return self", return_tensors="pt")
    more = {"decoder_input_ids": ids["input_ids"][:, :4]} if task == "seq2seq" else {}
    stock = getattr(transformers, kind).from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, _ = load_checkpoint(tmp_path)
    again = compress.load(tmp_path).model
    with torch.no_grad():
        wanted = bundle.model(**ids, **more).logits
        for other in (stock, ours, again):
            torch.testing.assert_close(other(**ids, **more).logits, wanted, rtol=1e-5, atol=1e-5)
            assert equal(other.state_dict(), bundle.model.state_dict())
    assert tokenizer.get_vocab() == bundle.tokenizer.get_vocab()
    pair = ("def a", "return b")
    assert dict(tokenizer(*pair)) == dict(bundle.tokenizer(*pair))
    assert sorted(tokenizer.get_vocab().values()) == list(range(700))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_family_takes_every_tokenizer(name, kind):
    changes = {"byte_fallback": False} if kind == "unigram" else {}
    bundle = made(name, tokenizer=kind, **changes)
    tokenizer = bundle.tokenizer
    assert len(tokenizer) == tokenizer.backend_tokenizer.get_vocab_size() == 700
    assert bundle.model.get_input_embeddings().weight.shape[0] == 700
    ids = tokenizer("def scan")["input_ids"]
    inside = tokenizer("def scan", add_special_tokens=False)["input_ids"]
    if name == "bert":
        assert ids == [tokenizer.cls_token_id, *inside, tokenizer.sep_token_id]
        assert frame_of(tokenizer) == Frame((2,), (3,))
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (0, 1, 4)
        assert bundle.model.config.pad_token_id == 0
        assert tokenizer(f"def {tokenizer.mask_token}")["input_ids"][-2] == 4
    elif name == "t5":
        assert ids == [*inside, tokenizer.eos_token_id]
        assert frame_of(tokenizer) == Frame()
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
        assert bundle.model.config.decoder_start_token_id == 0
        assert bundle.model.generation_config.decoder_start_token_id == 0
        assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_9>"]) == [699, 690]
        assert tokenizer("<extra_id_0>")["input_ids"][0 if kind != "unigram" else -2] == 699
    else:
        assert ids == inside
        assert frame_of(tokenizer) == Frame()
        assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
        assert bundle.model.get_input_embeddings().padding_idx is None
    assert bundle.model.config.vocab_size == 700


def test_wordpiece_is_what_stock_bert_makes_of_its_vocabulary():
    for lowercase in (False, True):
        tokenizer = made("bert", lowercase=lowercase).tokenizer
        stock = transformers.BertTokenizerFast(vocab=tokenizer.get_vocab(), do_lower_case=lowercase)
        for pair in (("Déjà Vu, self.scan_once(x)", "naïve 漢字 --"), (TEXT[0].text, TEXT[1].text)):
            found = tokenizer(*pair, verbose=False)
            assert dict(found) == dict(stock(*pair, verbose=False))
        types = np.array(found["token_type_ids"])
        assert types[-1] == 1
        assert (np.diff(types) >= 0).all()
        assert not lowercase or all(t == t.lower() for t in tokenizer.get_vocab() if t[0] != "[")


def test_an_alphabet_covers_words_that_the_text_never_had():
    tokenizer = made("bert").tokenizer
    letters = sorted({c for d in TEXT for c in d.text if c.isalnum()})
    words = ["".join(letters[i:]) + "".join(letters[:i]) for i in range(len(letters))]
    ids = tokenizer(" ".join(words), add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("漢", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn 'é' # 漢字 🙂\r\n", "a  <0xE2> <0x41>  <b>", "x\x00\x7fy"]
)
def test_a_unigram_with_bytes_is_lossless_and_never_takes_text_for_a_byte(text):
    tokenizer = made("t5").tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    bare = made("t5", byte_fallback=False).tokenizer
    assert (bare.unk_token_id in bare(text)["input_ids"]) == any(c in text for c in "漢\x00")


def test_the_same_text_gives_the_same_vocabulary():
    for kind in KINDS:
        files = [
            train_tokenizer([d.text for d in TEXT], 900, 64, kind, "bert").backend_tokenizer.to_str()
            for _ in range(3)
        ]
        assert files[0] == files[1] == files[2]


def test_rare_characters_are_left_to_bytes_where_they_would_take_too_much():
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
    texts = [TEXT[0].text * 2, many]
    tokenizer = train_tokenizer(texts, 700, 64, "unigram", "t5", sentinels=10)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    room = 700 - 3 - 256 - 10
    assert sum(len(piece) == 1 for piece, _ in model["vocab"]) <= room // 2
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) == text
    with pytest.raises(UserError, match="alone are 5[0-9][0-9]: ask for more"):
        train_tokenizer(texts, 520, 64, "unigram", "t5", sentinels=10, byte_fallback=False)


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_text_and_too_many_characters_are_one_line(kind):
    with pytest.raises(UserError, match=r"vocab_size: 500 tokens were asked, the text yields only \d+: give"):
        train_tokenizer(["abc abd"], 500, 64, kind, "bert")
    many = "".join(map(chr, range(0x400, 0x500)))
    with pytest.raises(UserError, match=r"vocab_size: 260 tokens were asked, .* alone are \d+: ask for more"):
        train_tokenizer([many], 260, 64, kind, "bert", byte_fallback=False)


def test_every_dimension_of_a_t5_and_a_bert_can_be_set():
    t5 = made("t5", layers=2, decoder_layers=1, head_dim=24, relative_buckets=8, relative_distance=20)
    config = t5.model.config
    assert (config.num_layers, config.num_decoder_layers, config.d_kv, config.d_ff) == (2, 1, 24, 64)
    assert (config.relative_attention_num_buckets, config.relative_attention_max_distance) == (8, 20)
    assert config.feed_forward_proj == "gated-gelu"
    assert t5.model.lm_head.weight is t5.model.shared.weight
    assert tiny("t5", layers=3).config().num_decoder_layers == 3
    bert = tiny("bert", type_vocab_size=1, dropout=0.2).config()
    assert (bert.type_vocab_size, bert.max_position_embeddings, bert.hidden_act) == (1, 64, "gelu")
    assert (bert.hidden_dropout_prob, bert.attention_probs_dropout_prob) == (0.2, 0.2)
    assert tiny("bert").config().hidden_dropout_prob == tiny("t5").config().dropout_rate == 0
    assert tiny("llama", head_dim=24).config().head_dim == 24


def test_a_t5_with_a_head_of_its_own_keeps_it(tmp_path):
    bundle = made("t5", tie_embeddings=False)
    model = bundle.model
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    bundle.save(tmp_path / "a")
    stock = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 9]])}
    with torch.no_grad():
        wanted = model(**ids).logits
        for loaded in (stock, Bundle.load(tmp_path / "a").model):
            torch.testing.assert_close(loaded(**ids).logits, wanted, rtol=1e-5, atol=1e-5)
            assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert float(wanted.std()) < 3


def test_the_seed_decides_the_weights(family):
    name, bundle = family
    assert equal(made(name).model.state_dict(), bundle.model.state_dict())
    assert not equal(made(name, seed=1).model.state_dict(), bundle.model.state_dict())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"family": "bert", "kv_heads": 1}, "kv_heads=1: family 'bert' .* no such thing, only llama"),
        ({"family": "llama", "decoder_layers": 2}, "decoder_layers=2.*only t5; leave it out"),
        ({"family": "t5", "lowercase": True}, "lowercase=True.*unigram tokenizer has no.*only wordpiece"),
        ({"family": "t5", "tokenizer": "bpe", "byte_fallback": False}, "byte_fallback=False.*only unigram"),
        ({"family": "t5", "head_dim": 15}, "head_dim=15 must be even"),
        ({"family": "t5", "vocab_size": 300}, "vocab_size=300: special tokens and bytes alone take 359"),
        ({"family": "roberta"}, "'llama', 'gpt2', 'bert' or 't5'"),
        ({"tokenizer": "words"}, "'bpe', 'wordpiece' or 'unigram'"),
    ],
)
def test_what_a_family_does_not_have_is_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        Architecture.model_validate(wrong)


def test_a_recipe_that_spells_out_every_default_is_read_again():
    for name in CLASSES:
        architecture = tiny(name)
        assert Architecture.model_validate(architecture.model_dump(mode="json")) == architecture


@pytest.mark.parametrize(("name", "kind"), [("bert", "wordpiece"), ("t5", "unigram"), ("gpt2", "wordpiece")])
def test_windows_and_the_bytes_they_stand_for(name, kind):
    tokenizer = made(name, tokenizer=kind).tokenizer
    config = DataConfig(window=16, evaluation_windows=6, calibration_windows=4, heldout_windows=2)
    data = prepare(config, TEXT, tokenizer, training=True, tokenizer_from_text=True, rows=700)
    windows, frame = data.evaluation, frame_of(tokenizer)
    assert windows.tokens.shape == (6, 16)
    assert (windows.tokens[:, : len(frame.begin)] == frame.begin).all()
    assert not frame.end or (windows.tokens[:, -1] == tokenizer.sep_token_id).all()
    # the stretch of text that gives these tokens, found by reading all of it at once
    text = "".join(d.text for d in TEXT)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, wanted = np.array(encoded["input_ids"]), windows.text
    length = len(wanted)
    starts = [i for i in range(len(ids) - length + 1) if (ids[i : i + length] == wanted).all()]
    if kind == "unigram":  # every unit of the text begins with a space of its own
        assert 0 < windows.bytes <= len(text.encode())
        return
    assert len(starts) == 1
    ends = np.array([end for _, end in encoded["offset_mapping"]])
    positions = np.arange(starts[0], starts[0] + length).reshape(6, -1)
    size = [len(text[: ends[i]].encode()) for i in range(len(ends))]
    wanted_bytes = sum(
        size[row[-1]] - (size[row[0] - 1] if frame.begin else size[row[0]]) for row in positions
    )
    # the text was read in pieces, each to its end: a line end at a border may count with the token before
    assert abs(windows.bytes - wanted_bytes) <= 2


def test_no_byte_of_a_text_is_lost_with_its_white_space():
    """All tokens of a text together stand for all of it, what WordPiece drops included."""
    text = "  alpha beta\n\n" * 400
    tokenizer = train_tokenizer([text], 26, 64, "wordpiece", "bert")
    config = DataConfig(window=8, evaluation_windows=20, calibration_windows=20, heldout_windows=2)
    data = prepare(config, [Document("a", text)], tokenizer, training=False)
    assert len(tokenizer("alpha beta", add_special_tokens=False)["input_ids"]) == 2
    # between two special tokens 6 of text, which are 3 lines of 14 bytes; but for the two line ends after
    # the last of them, and one that may stand before the first
    assert 20 * 3 * 14 - 2 <= data.evaluation.bytes <= 20 * 3 * 14 + 1
