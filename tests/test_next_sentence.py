"""Masked tokens with next sentences: what is asked, stock BertForPreTraining's loss, and whole runs."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
import yaml
from cli_helpers import DATA, invoke, refused
from encoder_models import tiny_encoder, tiny_model
from test_create_families import TEXT
from transformers import BertConfig, BertForPreTraining, ElectraConfig

import compress
from compress.errors import UserError
from compress.measure.quality import score, summarise
from compress.models.create import Architecture, create
from compress.passes.train import Train
from compress.tasks.base import UNKNOWN
from compress.tasks.next_sentence import FOREIGN, MASKED_NEXT, first_of, joined, types_of
from compress.tasks.registry import auto_class, task_of
from compress.text.windows import TextData
from compress.training.objectives.base import Moment
from compress.training.objectives.next_sentence import heldout_pairs, pairs_of_text

BEGIN, END, MASK = 0, 1, 4  # of the tokenizer of words
SHAPE = {
    "family": "bert", "preset": "1m", "hidden": 32, "layers": 2, "heads": 2, "intermediate": 64,
    "vocab_size": 700, "context": 64, "next_sentence": True,
}  # fmt: skip


def windows(count=6, length=13, seed=0):
    text = np.random.default_rng(seed).integers(5, 97, (count, length - 2))
    return np.pad(text, ((0, 0), (1, 1)), constant_values=((0, 0), (BEGIN, END))).astype(np.int32)


def data(window=16, count=4):
    stream = np.random.default_rng(0).integers(5, 97, 600).astype(np.int32)
    text = TextData.of_tokens(window, train=stream, heldout=windows(count, window), begin=(BEGIN,))
    object.__setattr__(text, "end", (END,))
    return text


class Lent:
    def __init__(self, text, seed=1):
        self.data, self.seed = text, seed


def test_a_configuration_says_so():
    config = BertConfig(architectures=["BertForPreTraining"])
    assert task_of(config) is MASKED_NEXT
    assert auto_class(config) is transformers.AutoModelForPreTraining
    with pytest.raises(UserError, match="ElectraForPreTraining is neither a decoder"):
        task_of(ElectraConfig(architectures=["ElectraForPreTraining"]))


def test_two_texts_in_a_window():
    own, other = windows(2, 13)
    found = joined(own, other)
    first = first_of(13)
    assert first == 5
    assert found[:6].tolist() == own[:6].tolist()
    assert (found[6], found[0], found[-1]) == (END, BEGIN, END)
    assert found[7:-1].tolist() == other[6:11].tolist()
    assert joined(own, own)[7:-1].tolist() == own[6:11].tolist(), "it goes on where the first ended"
    assert types_of(13).tolist() == [0] * 7 + [1] * 6
    assert torch.equal(joined(torch.from_numpy(own), torch.from_numpy(other)), torch.from_numpy(found))
    assert joined(windows(3), windows(3, seed=1)).shape == (3, 13)


def test_every_second_window_gets_anothers_half():
    given = windows(8)
    for index in range(8):
        found = MASKED_NEXT.window(given, index)
        second = found[7:-1].tolist()
        sources = [n for n in range(8) if given[n, 6:11].tolist() == second]
        assert sources == [index] if index % 2 == 0 else sources != [index]
        assert np.array_equal(found, MASKED_NEXT.window(given, index))
        asked = MASKED_NEXT.question(found, index, MASK)
        hidden = asked.rows[:-1]
        assert len(hidden) == 2, "15 % of ten"
        assert not {0, 6, 12} & set(hidden.tolist())
        assert (asked.inputs[hidden] == MASK).all()
        assert asked.targets[:-1].tolist() == found[hidden].tolist()
        assert asked.rows[-1] == 13
        assert asked.types.tolist() == types_of(13).tolist()
    alone = MASKED_NEXT.window(given[:1], 0)
    assert alone[7:-1].tolist() == given[0, 6:11].tolist()


def asked_of(bundle):
    plan = Train(batch=8, window=16)
    return pairs_of_text(plan, bundle.model, bundle.tokenizer, Lent(data()))


def test_the_loss_and_its_gradient_are_stock_bert_for_pre_trainings():
    bundle = tiny_model("BertForPreTraining")
    objective = asked_of(bundle)
    (part,) = objective.material.check().micro_batches(3, 1)
    moment = Moment(3, 10, part.numbers)
    with objective.watch(bundle.model):
        asked = objective.ask(torch.from_numpy(part.rows), {}, moment)
        outputs = bundle.model(**asked.inputs)
        assert outputs.prediction_logits.dim() == 2, "the head is given the hidden tokens alone"
        loss = objective.loss(outputs, asked.inputs, asked.targets, moment)
        loss.backward()
    own = {name: p.grad.clone() for name, p in bundle.model.named_parameters()}
    bundle.model.zero_grad()
    tokens, labels = asked.targets[:, :-1], asked.targets[:, -1]
    stock = BertForPreTraining(bundle.model.config).eval()
    stock.load_state_dict(bundle.model.state_dict())
    wanted = stock(
        **asked.inputs, labels=tokens.masked_fill(tokens == UNKNOWN, -100), next_sentence_label=labels
    ).loss
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, p in stock.named_parameters():
        assert torch.allclose(own[name], p.grad, atol=1e-6), name


def test_half_of_the_pairs_are_foreign_and_drawn_anew():
    bundle = tiny_model("BertForPreTraining")
    objective = asked_of(bundle)
    foreign, seen = [], set()
    first = first_of(16)
    for step in range(40):
        for part in objective.material.micro_batches(step, 1):
            asked = objective.ask(torch.from_numpy(part.rows), {}, Moment(step, 40, part.numbers))
            own = joined(part.rows, part.rows)
            tokens, labels = asked.targets[:, :-1].numpy(), asked.targets[:, -1].numpy()
            ids = np.where(tokens == UNKNOWN, asked.inputs["input_ids"].numpy(), tokens)
            goes_on = (ids[:, first + 2 :] == own[:, first + 2 :]).all(1)
            assert (ids[:, : first + 2] == own[:, : first + 2]).all()
            assert (goes_on == (labels != FOREIGN)).all()
            assert (tokens[:, [0, first + 1, 15]] == UNKNOWN).all()
            foreign += labels.tolist()
            seen |= {tuple(row) for row in ids[labels == FOREIGN].tolist()}
    assert np.mean(foreign) == pytest.approx(0.5, abs=0.08)
    assert len(seen) > 0.9 * sum(foreign)
    again = asked_of(bundle)
    one, other = (
        o.ask(torch.from_numpy(part.rows), {}, Moment(39, 40, part.numbers)) for o in (objective, again)
    )
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])


def stock_numbers(model, given):
    """Mean nats per hidden token, per pair, and the share of pairs told right, by stock transformers."""
    words, pairs, right = [], [], []
    for index in range(len(given)):
        asked = MASKED_NEXT.question(MASKED_NEXT.window(given, index), index, MASK)
        ids, types = (torch.from_numpy(x.astype(np.int64))[None] for x in (asked.inputs, asked.types))
        with torch.inference_mode():
            out = model(input_ids=ids, token_type_ids=types)
        likely = out.prediction_logits[0].log_softmax(-1)
        words += [-float(likely[r, t]) for r, t in zip(asked.rows[:-1], asked.targets[:-1], strict=True)]
        told = out.seq_relationship_logits[0].log_softmax(-1)
        pairs.append(-float(told[index % 2]))
        right.append(int(told.argmax()) == index % 2)
    return np.mean(words), np.mean(pairs), np.mean(right)


def test_what_is_measured_is_what_the_stock_model_says(tmp_path):
    base, other = tiny_model("BertForPreTraining"), tiny_model("BertForPreTraining", seed=1)
    given = windows(10)

    def forward(bundle):
        @torch.inference_mode()
        def answer(tokens, types):
            ids, kinds = (torch.from_numpy(x.astype(np.int64)) for x in (tokens, types))
            return MASKED_NEXT.answers(bundle.model, ids, token_type_ids=kinds).numpy()

        return answer

    before = score(forward(base), given, task=MASKED_NEXT, mask_token=MASK, keep=tmp_path)
    after = score(forward(other), given, task=MASKED_NEXT, mask_token=MASK, base=tmp_path, together=4)
    found = summarise(after, before, 100)
    words, pairs, right = stock_numbers(other.model, given)
    assert found.nll == pytest.approx(words, rel=1e-5)
    assert found.metrics["next_sentence_accuracy"] == pytest.approx(right)
    assert found.metrics["next_sentence_nll"] == pytest.approx(pairs, rel=1e-4)
    assert found.delta_nll == pytest.approx(words - stock_numbers(base.model, given)[0], rel=1e-4)
    assert found.kl_to_base > 0
    assert (found.bits_per_byte, found.score, found.flips) == (None, None, None)
    assert heldout_pairs(other.model, given, MASK, "float32") == pytest.approx(words + pairs, rel=1e-5)


def test_it_learns_both():
    bundle = tiny_model("BertForPreTraining")
    rng = np.random.default_rng(0)
    # a window is of one letter: its halves follow where both are
    stream = np.concatenate([np.full(14, 5 + n) for n in rng.integers(0, 40, 400)]).astype(np.int32)
    held = np.pad(stream[: 14 * 16].reshape(16, 14), ((0, 0), (1, 1)), constant_values=((0, 0), (BEGIN, END)))
    text = TextData.of_tokens(16, train=stream, heldout=held.astype(np.int32), begin=(BEGIN,))
    object.__setattr__(text, "end", (END,))
    before = heldout_pairs(bundle.model, held.astype(np.int32), MASK, "float32")
    plan = Train(tokens=40_000, batch=32, optimizer="adamw", learning_rate=3e-3, precision="float32")
    trained = bundle.apply(plan, text=text)
    after = heldout_pairs(trained.model, held.astype(np.int32), MASK, "float32")
    assert trained.notes["heldout_after"] == pytest.approx(after, rel=1e-4)
    assert after < 0.6 * before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"begin": ()}, "puts one token before a text and one behind it, as BERT's"),
        ({"window": 8, "train": np.arange(5, 25)}, "1 windows of 8 tokens make no pairs"),
    ],
)
def test_what_makes_no_pairs(change, words):
    bundle = tiny_model("BertForPreTraining")
    text = data()
    for name, value in change.items():
        object.__setattr__(text, name, value)
    with pytest.raises(UserError, match=f"^train: .*{words}"):
        pairs_of_text(Train(batch=1), bundle.model, bundle.tokenizer, Lent(text))


@pytest.mark.parametrize(
    "step",
    [
        compress.QuantizeAuto(budget_bytes=60_000, measured_windows=2, measured_tokens=32),
        compress.PruneStructured(neurons=0.5),
        compress.PruneWanda(sparsity=0.5),
        compress.Student(blocks=1),
    ],
    ids=lambda step: step.name(),
)
def test_passes_take_it_and_it_stays_what_it_is(step, tmp_path):
    bundle = tiny_model("BertForPreTraining")
    changed = bundle.apply(
        step, text=TextData.of_tokens(16, heldout=windows(4, 16), calibration=windows(16, 16))
    )
    changed.save(tmp_path / "m")
    model = compress.load(tmp_path / "m").model
    assert type(model) is BertForPreTraining
    assert model.cls.seq_relationship.weight.shape == (2, 64)


def test_architectures():
    made = Architecture(**SHAPE)
    assert made.label.endswith("next sentences")
    model, tokenizer = create(made, TEXT, 0)
    assert type(model) is BertForPreTraining
    assert tokenizer("alpha", "beta")["token_type_ids"][-1] == 1
    with pytest.raises(ValueError, match="next_sentence=True: family 'llama'"):
        Architecture(next_sentence=True)
    with pytest.raises(ValueError, match="type_vocab_size=1: next sentences are told apart by two types"):
        Architecture(**{**SHAPE, "type_vocab_size": 1})


class TestRuns:
    def recipe(self, folder, **changes):
        (folder / "text.txt").write_text("".join(d.text for d in TEXT), encoding="utf-8")
        said = {
            "name": "pairs", "threads": 1, "model": {"create": SHAPE},
            "data": {**DATA, "text": str(folder / "text.txt")},
            "base": [{"train": {"tokens": 2048, "batch": 8}}],
            "variants": {
                "int8": [{"quantize_gptq": {"format": "int8"}}],
                "pruned": [{"prune_magnitude": {"sparsity": 0.5}}, {"train": {"tokens": 512, "batch": 4}}],
                "fewer": [{"prune_vocabulary": {"text": [str(folder / "text.txt")]}}],
            },
            "measure": {"prefill_tokens": 16, "rounds": 1, "timing_seconds": 1, "encoder_seconds": 0},
        }  # fmt: skip
        path = folder / "pairs.yaml"
        path.write_text(yaml.safe_dump({**said, **changes}, sort_keys=False), encoding="utf-8")
        return path

    def test_a_run_trains_quantizes_prunes_and_reloads(self, tmp_path):
        done = invoke("run", self.recipe(tmp_path), "-o", tmp_path / "run")
        assert done.code == 0, done.err
        results = {r.variant: r for r in compress.read_results(tmp_path / "run/results.jsonl")}
        assert set(results) == {"base", "int8", "pruned", "fewer"}
        for name in ("base", "pruned"):
            stock = BertForPreTraining.from_pretrained(tmp_path / "run" / name)
            given = np.load(tmp_path / "run/evaluation.npy")
            tokenizer = compress.load(tmp_path / "run" / name).tokenizer
            mask = tokenizer.mask_token_id
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(globals(), "MASK", mask)
                words, pairs, right = stock_numbers(stock.eval(), given)
            assert results[name].nll == pytest.approx(words, rel=1e-4)
            assert results[name].metrics["next_sentence_accuracy"] == pytest.approx(right)
            assert results[name].metrics["next_sentence_nll"] == pytest.approx(pairs, rel=1e-3)
        assert results["int8"].kl_to_base == pytest.approx(0, abs=0.01)
        assert results["fewer"].metrics["next_sentence_nll"] == pytest.approx(
            results["base"].metrics["next_sentence_nll"], rel=1e-3
        )
        page = (tmp_path / "run/report.md").read_text()
        assert "Next sentences told right, %" in page
        again = invoke("run", self.recipe(tmp_path), "-o", tmp_path / "run")
        assert again.code == 0, again.err
        assert "base 1/1 train: done before" in again.out + again.err

        # what it leaves is what people begin with: a head for labels, or the masked-LM head alone
        rows = compress.load(tmp_path / "run/base").apply(
            compress.Finetune(epochs=1, batch=8), labelled=self.rows(tmp_path)
        )
        assert type(rows.model).__name__ == "BertForSequenceClassification"
        plain = tmp_path / "plain"
        shutil.copytree(tmp_path / "run/base", plain)
        for name in ("manifest.json", "SHA256SUMS"):
            (plain / name).unlink(missing_ok=True)
        config = json.loads((plain / "config.json").read_text())
        (plain / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
        assert type(compress.load(plain).model).__name__ == "BertForMaskedLM"

    def rows(self, folder):
        lines = [f"{'alpha' if n % 2 else 'beta'} {n} return,{'ab'[n % 2]}" for n in range(40)]
        (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines))
        return folder / "rows.csv"

    def test_what_does_not_go(self, tmp_path):
        def told(*passes):
            path = self.recipe(tmp_path, variants={"other": list(passes)})
            return refused("run", path, "-o", tmp_path / "no", "--dry-run")

        assert "is not exported; finetune the model for what it is for, or write BertForMaskedLM" in told(
            "export_onnx"
        )
        assert "distill: does not take an encoder with a next-sentence head" in told(
            {"distill": {"tokens": 64}}
        )
        assert "train.spans: is for an encoder-decoder" in told({"train": {"spans": 0.1}})
        with pytest.raises(UserError, match=r"train: .* mask token"):
            tiny_model("BertForPreTraining").apply(
                Train(tokens=64, batch=2),
                text=TextData.of_tokens(16, train=np.arange(300), heldout=windows(4, 16)),
            )


def test_a_masked_model_has_nothing_of_it():
    assert task_of(tiny_encoder("bert").model.config).pairs is False
