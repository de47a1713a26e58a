"""An encoder learns to embed from pairs: the equations, what it is afterwards, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoder_models import tiny_encoder, tiny_model
from pair_examples import PROMPTS, bundle, labelled, numbers, pairs, sentence_encoder
from transformers import AutoModel, AutoTokenizer

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.models.companions import pooled_by
from compress.models.heads import without_head
from compress.passes.distill import Distill
from compress.passes.finetune import Finetune
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.student import Student
from compress.tasks.embedding import EMBEDDING, EMBEDDING_CLS
from compress.tasks.registry import task_of
from compress.text.encode import apart, encode
from compress.text.examples import Examples
from compress.text.labelled.base import Row
from compress.training.objectives.pairs import Together, cosent, pair_loss
from compress.training.pair_batches import PairBatches

ROWS = labelled(pairs(), "pair")
STEP = Finetune(epochs=12, batch=20, learning_rate=3e-3, heldout_points=4)


def test_texts_of_pairs_are_cut_apart_and_once(tmp_path):
    tokenizer = tiny_encoder("embedding").tokenizer
    rows = [Row("w5 w6", "", "w7"), Row("w5  w6", "", "w8 w9 w50"), Row("w7", "", "w5 w6")]
    cut = encode(rows, "pair", (), tokenizer, 64, apart=True)
    assert [tokenizer.decode(item.ids) for item in cut.items] == cut.texts == ["w7", "w5 w6", "w8 w9 w50"]
    assert cut.pairs == ((1, 0), (1, 2), (0, 1))
    assert all(item.types is None for item in cut.items)
    told = encode(
        [replace(row, label=n / 2) for n, row in enumerate(rows)], "number", (), tokenizer, 64, apart=True
    )
    assert told.pairs == ((1, 0, 0.0), (1, 2, 0.5), (0, 1, 1.0))
    told.save(tmp_path / "e.npz")
    again = Examples.load(tmp_path / "e.npz")
    assert (again.pairs, again.sha256) == (told.pairs, told.sha256)
    assert cut.sha256 != told.sha256
    assert apart(told, tokenizer, 64, wanted=True) is told
    together = apart(told, tokenizer, 64, wanted=False)
    assert (len(together), together.groups) == (3, (0, 1, 0))
    assert apart(together, tokenizer, 64, wanted=True).sha256 == told.sha256


def naive(a, b, known, scale):
    """From both sides, a loop per pair."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    total = 0.0
    for i in range(len(a)):
        for one, other, side in ((a, b, 0), (b, a, 1)):
            terms = []
            for j in range(len(a)):
                pair = (i, j) if side == 0 else (j, i)
                if j == i or not known[pair]:
                    terms.append(scale * one[i] @ other[j])
            total += np.log(np.exp(terms).sum()) - scale * one[i] @ other[i]
    return total / (2 * len(a))


def test_the_contrastive_loss_is_its_definition_and_what_belongs_together_no_negative():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 5)).astype(np.float32)
    rows = [(0, 1), (2, 3), (0, 4), (5, 3), (6, 2)]
    examples = Examples("pair", (), (None,) * 7, pairs=(*rows, (1, 2)))
    told = torch.tensor(rows, dtype=torch.float64)
    firsts, seconds = (torch.from_numpy(vectors[[row[side] for row in rows]]) for side in (0, 1))
    together = {frozenset(row) for row in examples.pairs}
    known = np.array(
        [[a == b or frozenset((a, b)) in together for b in told[:, 1].int().tolist()]
         for a in told[:, 0].int().tolist()]
    )  # fmt: skip
    assert known.sum() > len(rows), "0 with 4, 2 with 1, 6 with 2 ..."
    for scale in (1.0, 20.0):
        found = float(pair_loss(firsts, seconds, told, Together(examples), scale))
        wanted = naive(firsts.numpy().astype(float), seconds.numpy().astype(float), known, scale)
        assert found == pytest.approx(wanted, rel=1e-4)
    alone = pair_loss(firsts[:1], seconds[:1], told[:1], Together(examples), 20.0)
    assert float(alone) == pytest.approx(0, abs=1e-6)


def test_cosent_is_its_definition():
    rng = np.random.default_rng(1)
    cosines, told = rng.uniform(-1, 1, 6), np.array([0, 1, 1, 3, 5, 2.5])
    total = 1 + sum(
        np.exp(20 * (cosines[j] - cosines[i])) for i in range(6) for j in range(6) if told[i] > told[j]
    )
    found = cosent(torch.from_numpy(cosines), torch.from_numpy(told), 20.0)
    assert float(found) == pytest.approx(np.log(total))
    assert float(cosent(torch.from_numpy(cosines), torch.ones(6), 20.0)) == 0


def test_a_micro_batch_holds_both_texts_of_its_pairs():
    examples = encode(ROWS.train, "pair", (), tiny_encoder("embedding").tokenizer, 64, apart=True)
    batches = PairBatches(examples, 12, seed=0, padding=3)
    assert (batches.windows, batches.batch) == (100, 12)
    seen = []
    for step in range(9):  # the last has four
        for part in batches.micro_batches(step, 2):
            firsts, seconds = np.split(part.rows, 2)
            for number, one, other in zip(part.numbers, firsts, seconds, strict=True):
                row = ROWS.train[number]
                ids = [[int(word[1:]) for word in text.split()] for text in (row.text, row.pair)]
                assert [one[one != 3].tolist(), other[other != 3].tolist()] == ids
            assert part.more["targets"].shape == (len(part.numbers), 2)
            seen += part.numbers.tolist()
    assert sorted(seen) == list(range(100))


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_pairs_teach_a_model_that_stays_one_that_embeds(pooling, tmp_path):
    before = bundle(tmp_path / "m", pooling)
    tuned = before.apply(STEP, labelled=ROWS)
    notes = tuned.notes
    assert notes["heldout_after"] < notes["heldout_before"] - 0.1, "1 - MRR of the held-out pairs"
    assert (notes["pooling"], notes["pairs"]) == (pooling, 100)
    assert notes["negatives"] == "the other texts of 20 pairs at most"
    assert task_of(tuned.model.config) is task_of(before.model.config)
    assert dict(tuned.companions) == dict(before.companions)
    assert set(tuned.model.state_dict()) == set(before.model.state_dict())
    again = before.apply(STEP, labelled=ROWS)
    assert all(
        torch.equal(a, b) for a, b in zip(again.model.parameters(), tuned.model.parameters(), strict=True)
    )


def vectors_of(folder, texts, pooling):
    """As stock transformers gives them."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"))[0][0]
        found.append({"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[pooling])
    return torch.stack(found)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_head_of_a_masked_lm_goes_and_files_say_how_states_are_pooled(pooling, tmp_path):
    source = tiny_encoder("bert")
    body = {name: p.clone() for name, p in source.model.bert.named_parameters()}
    bare = without_head(source.model, EMBEDDING_CLS if pooling == "cls" else EMBEDDING)
    assert all(torch.equal(p, body[name]) for name, p in bare.named_parameters() if name in body)
    tuned = source.apply(STEP.model_copy(update={"pooling": pooling, "epochs": 1.0}), labelled=ROWS)
    assert tuned.notes["pooling_files"] == "written"
    tuned.save(tmp_path / "tuned")
    assert task_of(Bundle.load(tmp_path / "tuned").model.config).pooling == pooling
    texts = [row.text for row in ROWS.evaluation]
    ours = vectors_of(tmp_path / "tuned", texts, pooling)
    stock = pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(tmp_path / "tuned"), device="cpu"
    )
    torch.testing.assert_close(torch.from_numpy(stock.encode(texts)), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "step",
    [STEP, Student(blocks=1), PruneMagnitude(sparsity=0.5), Distill(epochs=1.0, batch=8)],
    ids=lambda step: step.name(),
)
def test_after_a_pass_sentence_transformers_gives_the_same_vectors_and_keeps_prompts(step, tmp_path):
    tuned = bundle(tmp_path / "m", "cls").apply(step, labelled=ROWS, text=None)
    tuned.save(tmp_path / "out")
    assert (tmp_path / "out" / "config_sentence_transformers.json").read_text() == PROMPTS
    texts = [row.text for row in ROWS.evaluation]
    ours = torch.nn.functional.normalize(vectors_of(tmp_path / "out", texts, "cls"), dim=-1)
    stock = pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(tmp_path / "out"), device="cpu"
    )
    assert stock.prompts["query"] == "find: "
    torch.testing.assert_close(torch.from_numpy(stock.encode(texts)), ours, rtol=1e-4, atol=1e-5)


def test_another_pooling_is_written_into_the_files(tmp_path):
    source = bundle(tmp_path / "m", "mean")
    tuned = source.apply(STEP.model_copy(update={"pooling": "cls", "epochs": 1.0}), labelled=ROWS)
    settings = json.loads(tuned.companions["1_Pooling/config.json"])
    assert (settings["pooling_mode_cls_token"], settings["pooling_mode_mean_tokens"]) == (True, False)
    assert task_of(tuned.model.config) is EMBEDDING_CLS
    assert task_of(source.model.config) is EMBEDDING, "the one that was given stays"
    assert pooled_by(source.companions, "mean", source.model.config, 64) == source.companions


def test_numbers_teach_the_order_of_cosines_where_the_model_pools(tmp_path):
    rows = labelled(numbers(260), "number")
    step = STEP.model_copy(update={"epochs": 12.0})
    tuned = bundle(tmp_path / "m").apply(step, labelled=rows)
    assert tuned.notes["heldout_after"] < tuned.notes["heldout_before"]
    assert task_of(tuned.model.config).embeds
    headed = tiny_encoder("embedding").apply(STEP.model_copy(update={"epochs": 1.0}), labelled=rows)
    assert task_of(headed.model.config).labels == "number", "of no stated pooling: a head, as before"
    stated = STEP.model_copy(update={"epochs": 1.0, "pooling": "mean", "stop_by": "loss"})
    assert task_of(tiny_encoder("bert").apply(stated, labelled=rows).model.config).embeds


def test_adapters_learn_pairs_and_are_merged(tmp_path):
    pytest.importorskip("peft")
    step = Finetune(epochs=12, batch=20, learning_rate=3e-3, lora={"rank": 4})
    tuned = bundle(tmp_path / "m").apply(step, labelled=ROWS)
    assert tuned.notes["heldout_after"] < tuned.notes["heldout_before"]
    assert not [name for name, _ in tuned.model.named_parameters() if "lora" in name]


@pytest.mark.parametrize("kind", ["pair", "number"])
def test_a_student_is_taught_by_the_texts_of_pairs(kind, tmp_path):
    rows = labelled(pairs() if kind == "pair" else numbers(), kind)
    teacher = Bundle.load(sentence_encoder(tmp_path / "m"))
    student = replace(teacher, model=tiny_encoder("embedding", seed=3).model)
    taught = student.apply(Distill(epochs=6.0, batch=16, learning_rate=3e-3), labelled=rows, base=teacher)
    assert taught.notes["heldout_after"] < 0.8 * taught.notes["heldout_before"]
    assert taught.notes["learnt_from"] == "tiny"


def test_what_cannot_be_learnt_is_refused_in_one_line(tmp_path):
    model = tiny_encoder("embedding")
    refused = {"label_smoothing": 0.1, "augment": {"delete": 0.1}}
    refused |= dict.fromkeys(("class_weights", "sampling"), "balanced")
    for field, value in refused.items():
        with pytest.raises(UserError, match=rf"finetune\.{field}: is for labels, and these are pairs"):
            model.apply(Finetune(epochs=1, **{field: value}), labelled=ROWS)
    single = tuple(Row(row.text, float(n % 5)) for n, row in enumerate(ROWS.train))
    with pytest.raises(UserError, match=r"finetune\.pooling: is of pairs of texts"):
        model.apply(Finetune(epochs=1, pooling="cls"), labelled=labelled(single, "number", 20, 8))
    alone = tuple(Row(row.text, "") for row in ROWS.train)
    with pytest.raises(UserError, match=r"labelled\.pair: '.*' stands alone"):
        model.apply(Finetune(epochs=1), labelled=labelled(alone, "pair", 20, 8))
    decoder = tiny_model("LlamaForCausalLM", num_key_value_heads=4)
    with pytest.raises(UserError, match="pairs teach an encoder to embed, and this is a decoder"):
        decoder.apply(Finetune(epochs=1), labelled=ROWS)
