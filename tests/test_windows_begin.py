"""Windows begin as the tokenizer begins every text; where it writes nothing first, they are plain text."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.measure.artifacts import measure_artifacts
from compress.measure.reference import Reference
from compress.measure.turns import Workers
from compress.records.protocol import MeasureProtocol
from compress.structured.vocabulary import kept_tokens, trimmed_tokenizer
from compress.text.framing import Frame, frame_of, prompt_of
from compress.text.translation import translation
from compress.text.windows import DataConfig, TextData, refuse_overlap, renumbered
from compress.training.batches import Batches

LINES = "".join(f"def f{i}(x): return x + {i % 7}  # größer\n" for i in range(700))
SIZES = {"window": 16, "evaluation_windows": 6, "calibration_windows": 5, "heldout_windows": 4}


def writing(tokenizer, template: str, **named: str):
    """A tokenizer that writes what the template says, `<s>` being its token 1."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>", **named})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=ids
    )
    return tokenizer


@pytest.fixture
def plain(bundle):
    return bundle.tokenizer


@pytest.fixture
def beginner(plain):
    return writing(plain, "<s> $A")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "t.txt").write_text(LINES, encoding="utf-8")
    return DataConfig(text=str(tmp_path / "t.txt"), **SIZES)


def test_every_window_is_the_beginning_and_the_text_that_follows_the_last(config, plain, beginner):
    bos = beginner.bos_token_id
    data = TextData.cut(config, beginner, training=True)
    ids = plain(LINES)["input_ids"]
    for windows in (data.evaluation, data.calibration, data.heldout):
        assert set(windows.tokens[:, 0]) == {bos}
        assert (windows.tokens == bos).sum() == len(windows.tokens)
        text = windows.tokens[:, 1:].ravel()
        assert np.array_equal(windows.text, text)
        assert plain.decode(text) in LINES or not plain.decode(text).isprintable()
        # all of the text is predicted, so all its bytes count; a cut character counts on one side
        assert abs(windows.bytes - len(plain.decode(text).encode())) <= 3
    assert data.begin == (bos,)
    assert bos not in data.train
    assert len(ids) > 5000


def test_without_a_token_first_nothing_is_put_there(config, plain):
    data = TextData.cut(config, plain, training=True)
    assert data.begin == ()
    assert data.evaluation.frame == Frame()
    whole = np.array(plain(LINES)["input_ids"])
    text = data.evaluation.tokens.ravel()
    assert any(np.array_equal(whole[i : i + len(text)], text) for i in range(len(whole) - len(text) + 1))


def test_what_is_named_and_never_written_is_no_part_of_a_window(config, plain):
    named = copy.deepcopy(plain)
    named.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
    data = TextData.cut(config, named)
    assert np.array_equal(data.evaluation.tokens, TextData.cut(config, plain).evaluation.tokens)


def test_what_ends_a_text_ends_no_window_of_a_decoder(config, plain):
    tokenizer = writing(plain, "<s> $A <|endoftext|>")
    assert frame_of(tokenizer) == Frame((tokenizer.bos_token_id,))
    assert prompt_of(tokenizer, "def", continues=True) == [tokenizer.bos_token_id, *plain("def")["input_ids"]]
    assert prompt_of(tokenizer, "def", continues=False)[-1] == tokenizer.eos_token_id


def test_an_encoders_pair_stands_around_whole_text(config, plain):
    tokenizer = writing(plain, "<s> $A <|endoftext|>", cls_token="<s>", sep_token="<|endoftext|>")
    windows = TextData.cut(config, tokenizer).evaluation
    assert set(windows.tokens[:, 0]) == {tokenizer.cls_token_id}
    assert set(windows.tokens[:, -1]) == {tokenizer.sep_token_id}
    whole = np.array(plain(LINES)["input_ids"])
    text = windows.text
    assert len(text) == 6 * 14
    assert any(np.array_equal(whole[i : i + len(text)], text) for i in range(len(whole) - len(text) + 1))
    with pytest.raises(UserError, match=r"data\.window: 2 tokens leave no room"):
        frame_of(tokenizer).room(2)


def test_windows_of_training_begin_so_and_predict_every_token_of_text_once():
    stream = np.arange(100, 100 + 33 * 8, dtype=np.int32)
    batches = Batches(stream, window=8, batch=4, seed=0, moving=False, begin=(1,))
    rows = np.concatenate([batches(step) for step in range(batches.windows // 4)])
    assert rows.shape == (32, 9)
    assert set(rows[:, 0]) == {1}
    assert sorted(rows[:, 1:].ravel()) == list(range(100, 100 + 32 * 8))
    assert all((np.diff(row[1:]) == 1).all() for row in rows)


def test_a_loss_is_that_of_the_model_reading_its_own_beginning(config, beginner, bundle, tmp_path):
    bundle = Bundle(bundle.model, beginner, bundle.lineage)
    bundle.model.resize_token_embeddings(len(beginner), mean_resizing=False)
    bundle.save(tmp_path / "m")
    protocol = MeasureProtocol(rounds=1, prefill_tokens=8)
    (result,) = measure_artifacts([tmp_path / "m"], config, None, protocol)

    windows = TextData.cut(config, beginner).evaluation
    text = torch.tensor(windows.tokens[:, 1:].astype(np.int64))
    read = torch.cat([torch.full((len(text), 1), beginner.bos_token_id), text[:, :-1]], dim=1)
    with torch.no_grad():
        logits = bundle.model(input_ids=read).logits.double()
    nats = -torch.log_softmax(logits, -1).gather(-1, text[..., None])  # (6, 15, 1)
    assert result.nll == pytest.approx(float(nats.mean()), abs=1e-5)
    size = len(beginner.decode(text.ravel()).encode())
    assert result.bits_per_byte == pytest.approx(float(nats.sum()) / np.log(2) / size, rel=1e-2)


def test_prompts_that_are_timed_begin_so(config, beginner):
    windows = TextData.cut(config, beginner).evaluation
    with Reference(None, windows) as reference:
        run = object.__new__(Workers)
        run.protocol, run.reference = MeasureProtocol(batch=3), reference
        prompt, following = map(np.load, run._text(8, None))
    assert prompt.shape == (3, 8)
    assert set(prompt[:, 0]) == {beginner.bos_token_id}
    assert beginner.bos_token_id not in prompt[:, 1:]
    assert beginner.bos_token_id not in following


def test_the_same_text_is_found_where_windows_cut_it_elsewhere(config, beginner):
    evaluation = TextData.cut(config, beginner).evaluation
    elsewhere = TextData.cut(
        config.model_copy(update={"window": 13, "evaluation_windows": 7}), beginner
    ).evaluation
    with pytest.raises(UserError, match="also in the calibration"):
        refuse_overlap(elsewhere.text, evaluation.text)


def test_a_smaller_vocabulary_has_its_own_number_for_it(config, beginner, tmp_path):
    data = TextData.cut(config, beginner, training=True)
    kept = kept_tokens(beginner, {int(i) for i in data.train})
    smaller = trimmed_tokenizer(beginner, kept)
    for name, tokenizer in (("wide", beginner), ("narrow", smaller)):
        tokenizer.save_pretrained(tmp_path / name)
    words = translation(*(Path(tmp_path / name / "tokenizer.json") for name in ("wide", "narrow")))
    assert words is not None
    new = renumbered(data, words)
    assert new.begin == (smaller.bos_token_id,) == frame_of(smaller).begin
    assert set(new.calibration.tokens[:, 0]) == {smaller.bos_token_id}
    assert set(words.whole(data.evaluation.tokens).first) == {1}


def test_trainings_that_begin_otherwise_are_not_each_other(config, plain, beginner):
    one, other = (TextData.cut(config, t, training=True) for t in (plain, beginner))
    assert one.train_sha256 != other.train_sha256
    given = TextData.of_tokens(8, train=np.arange(64), begin=(1,))
    assert given.train_sha256 != TextData.of_tokens(8, train=np.arange(64)).train_sha256


def test_the_curve_and_the_training_read_the_same(config, beginner, make_context, bundle):
    from compress.passes.train import Train

    bundle.model.resize_token_embeddings(len(beginner), mean_resizing=False)
    context = make_context(bundle)
    context.data = TextData.cut(config, beginner, training=True)
    seen = []
    hook = type(bundle.model).forward

    def watch(self, input_ids=None, **options):
        seen.append(input_ids)
        return hook(self, input_ids=input_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bundle.model), "forward", watch)
        Train(tokens=128, batch=4)(Bundle(bundle.model, beginner, bundle.lineage), context)
    assert seen
    assert {int(i) for rows in seen for i in rows[:, 0]} == {beginner.bos_token_id}
