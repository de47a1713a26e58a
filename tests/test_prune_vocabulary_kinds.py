"""WordPiece, Unigram and Llama's BPE trimmed to a megabyte in four scripts; encoders and T5 of fewer rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from script_texts import BYTES, SCRIPTS, made, text, words
from test_create_families import TEXT, tiny
from tokenizers import Tokenizer

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.measure.quality import score, summarise
from compress.models.create import create
from compress.passes.prune_vocabulary import PruneVocabulary
from compress.records.manifest import Lineage
from compress.runtimes.torch_runtime import TorchRuntime
from compress.structured.vocabulary import fewer_rows, kept_tokens, trimmed_tokenizer
from compress.text.translation import TranslatedWindows, Translation, translation
from compress.text.windows import DataConfig, TextData, prepare

KINDS = ("wordpiece", "unigram", "unigram-bytes", "llama")
SHARE = 0.25
CORPUS = text(SCRIPTS, 1_000_000, share=SHARE)  # of the words that the vocabularies are made of, a quarter


def cut(tokenizer: Any, lines: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    return found


@pytest.fixture(scope="module", params=KINDS)
def trimmed(request: pytest.FixtureRequest) -> Any:
    """(kind, whole tokenizer, what is left of it for the corpus, kept ids)."""
    whole = made(request.param)
    used = {i for ids in cut(whole, CORPUS.splitlines(keepends=True)) for i in ids}
    kept = kept_tokens(whole, used)
    return request.param, whole, trimmed_tokenizer(whole, kept), kept


def test_a_megabyte_is_cut_as_before(trimmed):
    _, whole, small, kept = trimmed
    assert len(CORPUS.encode()) >= 1_000_000
    assert len(small) == len(kept) < 0.9 * len(whole)
    lines = CORPUS.splitlines(keepends=True)
    before, after = cut(whole, lines), cut(small, lines)
    assert [[kept[i] for i in ids] for ids in after] == before
    assert small.batch_decode(after[:300]) == whole.batch_decode(before[:300])


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_text_of_the_same_words_is_cut_as_before(trimmed, script):
    _, whole, small, kept = trimmed
    lines = text((script,), 20_000, share=SHARE, seed=7).splitlines(keepends=True)
    known = set(kept)
    pairs = list(zip(cut(whole, lines), cut(small, lines), strict=True))
    covered = [(a, b) for a, b in pairs if known.issuperset(a)]
    assert len(covered) > 0.8 * len(lines)
    assert all([kept[i] for i in after] == before for before, after in covered)


def test_text_that_was_not_covered_is_still_written(trimmed):
    kind, whole, small, _ = trimmed
    lines = [f"{' '.join(words(script)[-200:])}" for script in SCRIPTS[:3]]
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    for line in lines:
        before, after = (
            tokenizer(line, add_special_tokens=False)["input_ids"] for tokenizer in (whole, small)
        )
        assert len(after) > len(before)
        assert small.decode(after, **plain) == whole.decode(before, **plain) == line
        assert small.unk_token_id not in after
    strange = "þ 🙂"
    found = small.decode(small(strange, add_special_tokens=False)["input_ids"], **plain)
    assert (found == strange) == (kind in ("unigram-bytes", "llama"))


def test_added_tokens_and_what_writes_anything_stay(trimmed, tmp_path):
    kind, whole, small, kept = trimmed
    added = {str(token) for token in whole.added_tokens_decoder.values()}
    assert added <= set(small.get_vocab())
    assert "<tool>" in added
    assert [kept[i] for i in small.all_special_ids] == whole.all_special_ids
    assert (
        small.convert_ids_to_tokens(small("a<tool>", add_special_tokens=False)["input_ids"])[-1] == "<tool>"
    )
    model = json.loads(small.backend_tokenizer.to_str())["model"]
    if kind in ("unigram-bytes", "llama"):
        assert set(BYTES) <= set(small.get_vocab())
        assert model["byte_fallback"]
    if kind.startswith("unigram"):
        old = dict(json.loads(whole.backend_tokenizer.to_str())["model"]["vocab"])
        assert all(old[token] == number for token, number in model["vocab"])
        assert min(number for _, number in model["vocab"]) == min(old.values())
        assert model["vocab"][model["unk_id"]][0] == "<unk>"
    small.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(whole)
    assert again.get_vocab() == small.get_vocab()
    pair = ("ab cd", "ef")
    assert [kept[i] for i in again(*pair)["input_ids"]] == whole(*pair)["input_ids"]


def test_every_token_that_goes_can_be_written_with_those_that_stay(trimmed, tmp_path):
    _, whole, small, kept = trimmed
    for name, tokenizer in (("whole", whole), ("small", small)):
        tokenizer.save_pretrained(tmp_path / name)
    between = translation(tmp_path / "whole" / "tokenizer.json", tmp_path / "small" / "tokenizer.json")
    assert between is not None
    names = {i: token for token, i in small.get_vocab().items()}
    gone = sorted(set(whole.get_vocab().values()) - set(kept))
    assert gone
    for token in gone:
        string, parts = between.strings[token], [names[piece] for piece in between.pieces(token)]
        assert len(parts) > 1
        if "##" in "".join(parts):
            assert parts[0].startswith("##") == string.startswith("##")
            assert all(part.startswith("##") for part in parts[1:])
        written = b"".join(
            bytes([BYTES.index(part)]) if part in BYTES else part.removeprefix("##").encode()
            for part in parts
        )
        assert written.decode() == string.removeprefix("##")


def test_stock_classes_of_bert_t5_and_xlm_roberta_are_read_back():
    pieces = made("wordpiece").get_vocab()
    entries = [tuple(e) for e in json.loads(made("unigram").backend_tokenizer.to_str())["model"]["vocab"]]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    fairseq = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    lines = CORPUS.splitlines()[:200]
    for whole in (
        transformers.BertTokenizerFast(vocab=pieces, do_lower_case=False),
        transformers.T5TokenizerFast(vocab=[*entries, *sentinels]),
        transformers.XLMRobertaTokenizerFast(vocab=[*fairseq, *entries[3:], ("<mask>", 0.0)]),
    ):
        before = whole(lines, verbose=False)["input_ids"]
        kept = kept_tokens(whole, {i for ids in before for i in ids})
        small = trimmed_tokenizer(whole, kept)
        assert type(small) is type(whole)
        assert [[kept[i] for i in ids] for ids in small(lines, verbose=False)["input_ids"]] == before
        assert len(small) == len(kept) < len(whole)


def test_a_character_that_is_no_token_by_itself_keeps_its_words():
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "a", "##b", "über", "ab", "b", "##a", "##bü"])}
    content = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(
            json.dumps(
                {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "BertPreTokenizer"}}
                | {"model": {**content, "max_input_chars_per_word": 100, "vocab": vocabulary}}
            )
        )
    )
    kept = kept_tokens(whole, [])
    assert [token for token, i in vocabulary.items() if i not in kept] == ["ab"]


# ---- models


def bundle_of(family: str, tied: bool = True, **changes: Any) -> Bundle:
    return Bundle(*create(tiny(family, tie_embeddings=tied, **changes), TEXT, 0), Lineage(source="tiny"))


def lent(bundle: Bundle, folder: Path, window: int = 32) -> Context:
    config = DataConfig(window=window, evaluation_windows=4, calibration_windows=4, heldout_windows=2)
    folder.mkdir(parents=True, exist_ok=True)
    return Context(
        data=prepare(config, TEXT, bundle.tokenizer, training=True), teacher=lambda: bundle, seed=0,
        workdir=folder, device=torch.device("cpu"), threads=1, precision="float32",
    )  # fmt: skip


def pair(
    family: str, folder: Path, min_count: int, **changes: Any
) -> tuple[Bundle, Bundle, TextData, Translation]:
    bundle = bundle_of(family, **changes)
    torch.manual_seed(0)
    with torch.no_grad():  # biases begin at zero
        for parameter in bundle.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    context = lent(bundle, folder / "work")
    small = PruneVocabulary(min_count=min_count)(bundle, context)
    bundle.save(folder / "before")
    small.save(folder / "after")
    words_of = translation(folder / "before" / "tokenizer.json", folder / "after" / "tokenizer.json")
    assert words_of is not None
    return bundle, small, context.data, words_of


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_logits_of_what_stays_are_what_they_were(family, tied, tmp_path):
    bundle, small, _, between = pair(family, tmp_path, 100, tied=tied)
    new = torch.arange(5, 25)[None]
    rows = torch.from_numpy(between.rows).long()
    old, more = rows[new], {}
    if family == "t5":
        more = {"decoder_input_ids": torch.zeros((1, 1), dtype=torch.long)}
    with torch.no_grad():
        wanted = bundle.model(input_ids=old, **more).logits[..., rows]
        found = small.model(input_ids=new, **more).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # products of other widths
    assert small.model.config.vocab_size == len(rows) == small.notes["rows_kept"] < 700
    names = [n for n, p in small.model.named_parameters(remove_duplicate=False) if 700 in p.shape]
    assert not names
    head, table = small.model.get_output_embeddings(), small.model.get_input_embeddings()
    assert (head.weight is table.weight) == tied
    if family == "bert":
        bias = dict(bundle.model.named_parameters(remove_duplicate=False))["cls.predictions.bias"]
        assert torch.equal(small.model.cls.predictions.bias, bias[rows])
        assert torch.equal(
            small.model.cls.predictions.decoder.bias, bundle.model.cls.predictions.decoder.bias[rows]
        )
        assert small.tokenizer.mask_token_id == between.own["[MASK]"]
    if family == "t5":
        for name in ("encoder", "decoder"):
            assert getattr(small.model, name).embed_tokens.weight is small.model.shared.weight
        layers = set(PruneVocabulary().layers(bundle.model))
        assert layers == {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
        assert rows[small.model.config.decoder_start_token_id] == bundle.model.config.decoder_start_token_id
        assert small.model.generation_config.decoder_start_token_id == small.tokenizer.pad_token_id
    kind = type(bundle.model)
    stock = kind.from_pretrained(tmp_path / "after", dtype=torch.float32).eval()
    with torch.no_grad():
        for loaded in (stock, Bundle.load(tmp_path / "after").model):
            torch.testing.assert_close(loaded(input_ids=new, **more).logits, found, rtol=1e-5, atol=1e-5)
            assert loaded.config.vocab_size == len(rows)


def test_a_bias_of_its_own_shape_follows():
    """BART keeps one of (1, tokens) for its head, as a buffer."""
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=16, max_position_embeddings=40,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    config.architectures = ["BartForConditionalGeneration"]
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config).eval()
    model.final_logits_bias.copy_(torch.arange(40.0))
    kept = [0, 1, 2, 5, 8, 39]
    small = fewer_rows(model, kept)
    assert torch.equal(small.final_logits_bias, torch.tensor([[0.0, 1, 2, 5, 8, 39]]))
    ids, start = torch.tensor([[3, 4, 5]]), torch.tensor([[2]])
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(kept)[ids], decoder_input_ids=start).logits[..., kept]
        found = small(input_ids=ids, decoder_input_ids=start).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # products of other widths


def scored(folder: Path, windows: Any, between: Translation) -> tuple[Any, Any, Any]:
    """(base's quality, the trimmed one's, the windows in the smaller vocabulary)."""
    (folder / "logits").mkdir()
    between.whole(windows).save(folder / "w.npz")
    found = TranslatedWindows.load(folder / "w.npz")
    base, small = (TorchRuntime(folder / name, 1) for name in ("before", "after"))
    kept = score(base.logits, windows, keep=folder / "logits", task=base.task, mask_token=base.mask_token)
    other = score(
        small.logits, windows, base=folder / "logits", task=small.task, mask_token=small.mask_token,
        translated=found,
    )  # fmt: skip
    return summarise(kept, None, 100), summarise(other, kept, 100), found


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_question_is_the_same_where_every_token_stays(family, tmp_path):
    _, _, data, between = pair(family, tmp_path, 3 if family == "bert" else 40)
    rows = set(between.rows.tolist())
    text_of = [w for w in data.calibration.tokens if set(w.tolist()) <= rows]
    assert text_of
    base, found, windows = scored(tmp_path, np.stack(text_of), between)
    assert windows.rows is not None
    assert found.kl_to_base == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    # what the removed rows had of the probability is all that differs
    assert found.delta_nll < 0
    assert base.nll > 5


def test_all_pieces_of_a_hidden_token_are_hidden(tmp_path):
    _, small, data, between = pair("bert", tmp_path, 40)
    base, found, windows = scored(tmp_path, data.calibration.tokens, between)
    assert windows.rows is None
    assert found.kl_to_base is None
    assert found.top1_agreement is None
    nats, count = 0.0, 0
    for index, window in enumerate(data.calibration.tokens):
        inner = len(window) - 2  # the definition of tasks/masked.py
        hidden = np.random.default_rng(index).permutation(inner)[: round(0.15 * inner)] + 1
        count += len(hidden)
        own, targets = [], []
        for place, token in enumerate(window.tolist()):
            for piece in between.pieces(token):
                own.append(small.tokenizer.mask_token_id if place in hidden else piece)
                targets.append(piece if place in hidden else -100)
        with torch.no_grad():
            logits = small.model(input_ids=torch.tensor([own])).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum"))
    assert found.nll == pytest.approx(nats / count, rel=1e-5)
    assert found.delta_nll == pytest.approx(found.nll - base.nll)


def test_an_encoder_decoder_is_refused_where_a_token_is_in_pieces(tmp_path):
    _, _, data, between = pair("t5", tmp_path, 100)
    with pytest.raises(
        UserError, match="encoder-decoder cannot be asked the same; name the whole text under"
    ):
        scored(tmp_path, data.calibration.tokens, between)


def test_a_model_that_embeds_reads_the_pieces(tmp_path):
    bundle = bundle_of("bert")
    model = transformers.BertModel(bundle.model.config, add_pooling_layer=True).eval()
    model.config.architectures = ["BertModel"]
    bundle = bundle.evolve(model=model)
    context = lent(bundle, tmp_path / "work")
    for name, count in (("same", 2), ("pieces", 40)):
        small = PruneVocabulary(min_count=count)(bundle, context)
        folder = tmp_path / name
        bundle.save(folder / "before")
        small.save(folder / "after")
        between = translation(folder / "before" / "tokenizer.json", folder / "after" / "tokenizer.json")
        assert between is not None
        rows = set(between.rows.tolist())
        whole = [w for w in context.data.calibration.tokens if set(w.tolist()) <= rows]
        windows = np.stack(whole) if name == "same" else context.data.calibration.tokens
        _, found, _ = scored(folder, windows, between)
        if name == "same":
            assert found.cosine_distance == pytest.approx(0, abs=1e-6)
        else:
            assert 0 < found.cosine_distance < 1


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_a_model_that_labels_reads_the_pieces(head, tmp_path):
    """A text's label is asked of all pieces, a token's of its first."""
    bundle = bundle_of("bert")
    config = bundle.model.config
    config.num_labels, config.architectures = 5, [head]
    model = getattr(transformers, head)(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # far enough from its small start for labels to differ
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    bundle = bundle.evolve(model=model)
    context = lent(bundle, tmp_path / "work")
    small = PruneVocabulary(min_count=40)(bundle, context)
    bundle.save(tmp_path / "before")
    small.save(tmp_path / "after")
    between = translation(tmp_path / "before" / "tokenizer.json", tmp_path / "after" / "tokenizer.json")
    assert between is not None
    windows = context.data.calibration.tokens
    _, found, translated = scored(tmp_path, windows, between)
    assert translated.rows is None
    kl, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            pieces = [between.pieces(token) for token in window.tolist()]
            own = torch.tensor([[piece for each in pieces for piece in each]])
            base = bundle.model(input_ids=torch.from_numpy(window).long()[None]).logits.log_softmax(-1)
            other = small.model(input_ids=own).logits.log_softmax(-1)
            if "Token" in head:
                other = other[:, np.cumsum([0, *map(len, pieces)])[:-1]]
            kl += float((base.exp() * (base - other)).sum())
            count += base[..., 0].numel()
    assert found.kl_to_base == pytest.approx(kl / count, rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_model_without_the_rows_of_a_run_is_measured(family, tmp_path):
    """Through the command line: trimmed to the whole text, then rounded."""
    from cli_helpers import invoke, results, write_recipe, write_text

    source = write_text(tmp_path / "text", documents=30)
    create_ = {"family": family, "preset": "1m", "hidden": 32, "layers": 1, "heads": 2, "intermediate": 64}
    create_ |= {"context": 64, "vocab_size": 340, "tokenizer": "unigram"}
    create_ |= {"sentinels": 10} if family == "t5" else {}
    recipe = write_recipe(
        tmp_path / "r.yaml", source, model={"create": create_},
        variants={"trimmed": [{"prune_vocabulary": {"text": [str(source)]}}, "quantize_round"]},
    )  # fmt: skip
    outcome = invoke("run", recipe, "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    found = results(tmp_path / "run")["trimmed", "torch"]
    assert 0 <= found["kl_to_base"] < 0.1
