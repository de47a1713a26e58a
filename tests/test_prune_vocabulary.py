"""A trimmed vocabulary: no text is lost, known text is cut as before, and the loss is of the same text."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_set
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from compress.artifact.bundle import Bundle
from compress.artifact.counts import weight_file_bytes
from compress.errors import UserError
from compress.measure.quality import score, summarise
from compress.passes.prune_vocabulary import PruneVocabulary
from compress.runtimes.torch_runtime import TorchRuntime
from compress.structured.vocabulary import kept_tokens, require_trimmable, trimmed_tokenizer
from compress.text.documents import text_hash
from compress.text.translation import TranslatedWindows, translation
from compress.text.windows import Windows, renumbered

TEXTS = [d.text for d in training_set.documents()]
SHORT = TEXTS[0][:60]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[int]]:
    """A tokenizer with special tokens at its end, what is left of it for one short text, and the ids."""
    bundle = training_set.tiny_bundle()
    tokenizer = bundle.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    kept = kept_tokens(tokenizer, tokenizer(SHORT)["input_ids"])
    return tokenizer, trimmed_tokenizer(tokenizer, kept), kept


@settings(max_examples=30)
@given(st.text(max_size=40))
def test_any_text_is_written_and_read_back(pair, text):
    _, small, _ = pair
    assert small.decode(small(text, add_special_tokens=False)["input_ids"], skip_special_tokens=False,
                        clean_up_tokenization_spaces=False) == text  # fmt: skip


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(set(SHORT.split()))), max_size=12), st.sampled_from([" ", "\n"]))
def test_words_that_were_counted_are_cut_as_before(pair, words, between):
    whole, small, kept = pair
    text = "".join(f"{between}{word}" for word in words) if between == " " else " ".join(["", *words])
    known = set(whole.tokenize(text)) <= set(small.get_vocab())
    assert not known or small.tokenize(text) == whole.tokenize(text)
    if known:
        ids = whole(text, add_special_tokens=False)["input_ids"]
        assert [kept[i] for i in small(text, add_special_tokens=False)["input_ids"]] == ids


def test_the_counted_text_is_cut_as_before_and_special_tokens_stay(pair, tmp_path):
    whole, small, kept = pair
    assert small.tokenize(SHORT) == whole.tokenize(SHORT)
    assert len(small) == len(kept) < len(whole)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == small.get_vocab()
    assert loaded.tokenize(f"{SHORT}<tool>") == [*whole.tokenize(SHORT), "<tool>"]
    assert sorted(loaded.get_vocab().values()) == list(range(len(kept)))
    assert loaded.eos_token == whole.eos_token
    assert kept[loaded.eos_token_id] == whole.eos_token_id


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_what_stays_are_what_they_were(tied, make_context, tmp_path):
    bundle = training_set.tiny_bundle(tie_embeddings=tied)
    result = PruneVocabulary(min_count=10**5)(bundle, make_context(bundle))
    bundle.save(tmp_path / "before")
    result.save(tmp_path / "after")
    words = translation(tmp_path / "before" / "tokenizer.json", tmp_path / "after" / "tokenizer.json")
    assert words is not None
    ids = torch.arange(3, 40)[None]
    old = torch.from_numpy(words.rows[ids.numpy()]).long()
    with torch.no_grad():
        wanted = bundle.model(old).logits[..., torch.from_numpy(words.rows).long()]
        assert torch.equal(result.model(ids).logits, wanted)
    head, table = result.model.get_output_embeddings(), result.model.get_input_embeddings()
    assert (head.weight is table.weight) == tied
    assert result.model.config.vocab_size == len(words.rows) == result.notes["rows_kept"]
    removed = weight_file_bytes(tmp_path / "before") - weight_file_bytes(tmp_path / "after")
    assert abs(removed - result.notes["bytes_removed"]) <= 16  # digits in the header
    assert 0 < result.notes["tokens_covered"] < 1
    assert words.rows[result.model.config.eos_token_id] == bundle.model.config.eos_token_id
    assert result.model.generation_config.eos_token_id == result.model.config.eos_token_id
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, result.model(ids).logits)


def test_nothing_goes_where_everything_is_used(bundle, make_context):
    result = PruneVocabulary()(bundle, make_context(bundle))
    assert result.notes["rows_removed"] == 0
    assert result.notes["gain"].startswith("no gain")
    assert result.tokenizer.get_vocab() == bundle.tokenizer.get_vocab()


def test_files_of_yours_say_what_stays(bundle, make_context, tmp_path):
    rare = tmp_path / "rare.txt"
    rare.write_text("omega sigma " * 100, encoding="utf-8")
    result = PruneVocabulary(text=(str(rare),))(bundle, make_context(bundle))
    assert set(bundle.tokenizer.tokenize("omega sigma ")) <= set(result.tokenizer.get_vocab())


def test_a_file_that_changed_is_read_again(bundle, tmp_path):
    rare = tmp_path / "rare.txt"
    found = []
    for words in ("omega sigma ", "omega delta "):
        rare.write_text(words * 100, encoding="utf-8")
        found.append([text_hash(source) for source in PruneVocabulary(text=(str(rare),)).texts()])
    assert found[0] != found[1]


def test_a_token_that_the_model_has_no_row_for_is_refused(bundle, make_context):
    other = bundle.evolve(tokenizer=copy.deepcopy(bundle.tokenizer))
    other.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(
        UserError, match=r"token \d+ of the tokenizer .'\[PAD\]'. is beyond the model's \d+ rows"
    ):
        PruneVocabulary()(other, make_context(bundle))


def both(bundle: Bundle, small: Bundle, folder: Path, windows: np.ndarray) -> tuple[Any, Any, Any]:
    """(base's quality, the trimmed one's, its translation) on the same windows."""
    (folder / "logits").mkdir()
    bundle.save(folder / "before")
    small.save(folder / "after")
    words = translation(folder / "before" / "tokenizer.json", folder / "after" / "tokenizer.json")
    assert words is not None
    words.whole(windows).save(folder / "w.npz")
    base = score(TorchRuntime(folder / "before", 1).logits, windows, keep=folder / "logits")
    found = score(
        TorchRuntime(folder / "after", 1).logits, windows, base=folder / "logits",
        translated=TranslatedWindows.load(folder / "w.npz"),
    )  # fmt: skip
    return summarise(base, None, 100), summarise(found, base, 100), words


def test_loss_is_of_the_same_text_and_kl_over_the_rows_that_both_have(bundle, make_context, tmp_path):
    context = make_context(bundle)
    windows = np.random.default_rng(0).choice([10, 40, 80, 120], (3, 16)).astype(np.int32)
    small = PruneVocabulary(min_count=10**5)(bundle, context)
    _, found, words = both(bundle, small, tmp_path, windows)
    assert found.kl_to_base == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    with torch.no_grad():
        logits = bundle.model(torch.from_numpy(windows[:, :-1]).long()).logits
    shared = logits[..., torch.from_numpy(words.rows).long()]
    lost = (logits.logsumexp(-1) - shared.logsumexp(-1)).mean()  # what removed rows had of the probability
    assert found.delta_nll == pytest.approx(-float(lost), abs=1e-5)
    assert found.delta_nll < 0


def test_a_token_in_pieces_keeps_the_text_and_leaves_the_kl_out(bundle, make_context, tmp_path):
    context = make_context(bundle)
    windows = context.data.evaluation.tokens[:3]
    small = PruneVocabulary(min_count=10**6)(bundle, context)  # only bytes are left
    base, found, words = both(bundle, small, tmp_path, windows)
    whole = words.whole(windows)
    assert whole.rows is None
    row = whole.tokens[0][whole.tokens[0] >= 0]
    assert small.tokenizer.decode(row) == bundle.tokenizer.decode(windows[0])
    assert found.kl_to_base is None
    with torch.no_grad():
        nats = 0.0
        for tokens, first in zip(whole.tokens, whole.first, strict=True):
            own = torch.from_numpy(tokens[tokens >= 0]).long()
            log = small.model(own[None, :-1]).logits[0].log_softmax(-1)
            nats -= float(log[torch.arange(len(own) - 1), own[1:]][first - 1 :].sum())
    assert found.nll == pytest.approx(nats / (3 * (windows.shape[1] - 1)), rel=1e-5)
    assert found.delta_nll == pytest.approx(found.nll - base.nll)


def test_data_for_later_passes_is_in_the_new_ids(bundle, make_context, tmp_path):
    context = make_context(bundle)
    small = PruneVocabulary(min_count=10**5)(bundle, context)
    bundle.save(tmp_path / "before")
    small.save(tmp_path / "after")
    words = translation(tmp_path / "before" / "tokenizer.json", tmp_path / "after" / "tokenizer.json")
    assert words is not None
    data = renumbered(context.data, words)
    assert isinstance(data.calibration, Windows)
    assert data.calibration.tokens.shape == context.data.calibration.tokens.shape
    assert data.calibration.tokens.max() < small.model.config.vocab_size
    assert small.tokenizer.decode(data.train) == bundle.tokenizer.decode(context.data.train)


def test_what_could_lose_text_is_refused(bundle, make_context):
    from export_models import tiny_bundle as of_words

    with pytest.raises(UserError, match="WordLevel.*no bytes to fall back on.*leave prune_vocabulary out"):
        PruneVocabulary()(bundle.evolve(tokenizer=of_words("llama").tokenizer), make_context(bundle))


def test_other_tokenizers_are_not_compared(bundle, tmp_path):
    content = json.loads(bundle.tokenizer.backend_tokenizer.to_str())
    for name, token in (("a", "alpha"), ("b", "beta")):
        (tmp_path / name).mkdir()
        content["added_tokens"][0]["content"] = f"<{token}>"
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match='its token ".*" is not in the vocabulary.*measure it on its own'):
        translation(tmp_path / "a" / "tokenizer.json", tmp_path / "b" / "tokenizer.json")


def test_bytes_that_a_tokenizer_never_had_are_not_asked_for(bundle):
    content = json.loads(bundle.tokenizer.backend_tokenizer.to_str())
    del content["model"]["vocab"]["ÿ"]  # 0xFF, which UTF-8 never has
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    require_trimmable(tokenizer)
    kept = kept_tokens(tokenizer, [])
    assert len(kept) >= 255
    small = trimmed_tokenizer(tokenizer, kept)
    assert small.decode(small("naïve 世界")["input_ids"]) == "naïve 世界"
