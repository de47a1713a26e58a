"""Chats are learnt and judged by their answers alone: against stock losses, and whole runs."""

import re
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml
from chat_models import PLAIN, chat_bundle, chats, labelled, row, write_chats
from cli_helpers import invoke, refused
from training_set import tiny_context

import compress
from compress.errors import UserError
from compress.measure.quality import score, summarise
from compress.models.conv1d import linears
from compress.tasks.base import UNKNOWN
from compress.tasks.causal import CAUSAL
from compress.tasks.registry import task_labelled
from compress.text.encode import encode
from compress.text.labelled.encoded import encoded
from compress.text.translation import Translation
from compress.training.example_batches import ExampleBatches
from compress.training.objectives.base import Moment
from compress.training.objectives.chats import answers_of_chats, heldout_answers

TUNED = {"epochs": 12, "batch": 8, "learning_rate": 3e-3, "heldout_points": 2, "precision": "float32"}


def examples(bundle, count=12, **options):
    return encode([row(each) for each in chats(count, **options)], "chat", (), bundle.tokenizer, 128)


def stock_loss(model, items):
    """That of transformers, with -100 wherever no answer is: mean over tokens of the answers."""
    longest = max(len(item.ids) for item in items)
    ids, labels = torch.zeros(len(items), longest, dtype=torch.long), None
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for place, item in enumerate(items):
        size = len(item.ids)
        ids[place, :size], mask[place, :size] = torch.from_numpy(item.ids.astype(np.int64)), 1
        answers = np.flatnonzero(item.targets != UNKNOWN) + 1
        labels[place, answers] = ids[place, answers]
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def test_the_task_of_chats_is_the_decoders():
    assert task_labelled("chat") is CAUSAL
    assert CAUSAL.labels is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_and_its_gradient_are_stock_transformers(family):
    bundle = chat_bundle(family=family, **({"kv_heads": None} if family == "gpt2" else {}))
    model, data = linears(bundle.model), examples(bundle)
    batches = ExampleBatches(data, 5, 0, 0)
    objective = answers_of_chats(batches, data, 0)
    moment = Moment(0, 10, np.arange(5))
    with objective.watch(model):
        (part,) = batches.micro_batches(0, 1)
        more = {name: torch.from_numpy(value) for name, value in part.more.items()}
        asked = objective.ask(torch.from_numpy(part.rows), more, moment)
        outputs = model(**asked.inputs)
        assert outputs.logits.dim() == 2, "the head is given the positions of answers alone"
        loss = objective.loss(outputs, asked.inputs, asked.targets, moment)
        loss.backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    wanted = stock_loss(model, [data[n] for n in part.numbers])
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(own[name], p.grad, atol=1e-6), name
    with torch.no_grad():
        whole = float(stock_loss(model, list(data.items)))
    assert heldout_answers(model, data, 0, "float32") == pytest.approx(whole, rel=1e-5)


def test_label_smoothing_is_torchs():
    bundle = chat_bundle()
    data = examples(bundle)
    batches = ExampleBatches(data, 4, 0, 0)
    objective = answers_of_chats(batches, data, 0, smoothing=0.2)
    (part,) = batches.micro_batches(0, 1)
    more = {name: torch.from_numpy(value) for name, value in part.more.items()}
    moment = Moment(0, 10, part.numbers)
    with torch.no_grad(), objective.watch(bundle.model):
        asked = objective.ask(torch.from_numpy(part.rows), more, moment)
        loss = objective.loss(bundle.model(**asked.inputs), asked.inputs, asked.targets, moment)
        logits = bundle.model(torch.from_numpy(part.rows), attention_mask=more["attention_mask"]).logits
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), more["targets"].flatten(), ignore_index=UNKNOWN, label_smoothing=0.2
    )
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_what_is_measured_is_the_stock_likelihood_of_answers(tmp_path):
    base, other = chat_bundle(), chat_bundle(seed=1)
    other = other.evolve(tokenizer=base.tokenizer)
    data = examples(base)

    def forward(bundle):
        def answer(tokens):
            with torch.inference_mode():
                return bundle.model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

        return answer

    before = score(forward(base), data, keep=tmp_path)
    after = score(forward(other), data, base=tmp_path, together=4)
    found = summarise(after, before, None)
    with torch.no_grad():
        wanted = float(stock_loss(other.model, list(data.items)))
        assert found.nll == pytest.approx(wanted, rel=1e-4)
        assert found.delta_nll == pytest.approx(
            wanted - float(stock_loss(base.model, list(data.items))), rel=1e-3
        )
        kl, agree = [], []
        for item in data.items:
            ids, asked = torch.from_numpy(item.ids.astype(np.int64))[None], item.targets != UNKNOWN
            p, q = (b.model(ids).logits[0, asked].log_softmax(-1) for b in (base, other))
            kl += (p.exp() * (p - q)).sum(-1).tolist()
            agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.kl_to_base == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.top1_agreement == pytest.approx(np.mean(agree))
    assert found.bits_per_byte is None
    assert found.delta_nll_ci95[0] <= found.delta_nll <= found.delta_nll_ci95[1]


def test_finetune_learns_answers_and_keeps_the_head():
    bundle = chat_bundle()
    data = encoded(labelled(60), (), bundle.tokenizer, 128)
    before = heldout_answers(bundle.model, data.evaluation, 0, "float32")
    tuned = bundle.apply(compress.Finetune(**TUNED), labelled=data)
    assert type(tuned.model) is type(bundle.model)
    after = heldout_answers(tuned.model, data.evaluation, 0, "float32")
    assert after < 0.7 * before
    assert (tuned.notes["task"], tuned.notes["stop_by"]) == ("causal", "loss")
    assert tuned.notes["heldout_after"] == pytest.approx(
        heldout_answers(tuned.model, data.heldout, 0, "float32"), rel=1e-5
    )


def test_what_is_asked_decides_nothing_but_what_is_read():
    """A target that is no answer's may be any token: training does not see it."""
    bundle = chat_bundle()
    data = encoded(labelled(), (), bundle.tokenizer, 128)
    asked = [item.targets != UNKNOWN for item in data.train.items]
    share = sum(map(np.sum, asked)) / data.train.size
    assert 0.1 < share < 0.6
    one = bundle.apply(compress.Finetune(epochs=1, batch=8), labelled=data)
    items = tuple(
        replace(item, targets=np.where(known, item.targets, UNKNOWN))
        for item, known in zip(data.train.items, asked, strict=True)
    )
    other = bundle.apply(
        compress.Finetune(epochs=1, batch=8), labelled=replace(data, train=replace(data.train, items=items))
    )
    assert all(v.equal(other.model.state_dict()[k]) for k, v in one.model.state_dict().items())


def test_adapters_leave_the_head_alone():
    pytest.importorskip("peft")
    bundle = chat_bundle(tie_embeddings=False)
    data = encoded(labelled(), (), bundle.tokenizer, 128)
    tuned = bundle.apply(compress.Finetune(epochs=1, batch=8, lora={"rank": 2}), labelled=data)
    assert torch.equal(tuned.model.lm_head.weight, bundle.model.lm_head.weight)
    assert not torch.equal(
        tuned.model.model.layers[0].mlp.up_proj.weight, bundle.model.model.layers[0].mlp.up_proj.weight
    )


def test_text_of_chats_is_what_the_template_writes(tmp_path):
    bundle = chat_bundle()
    data = encoded(labelled(), (), bundle.tokenizer, 128)
    config = compress.DataConfig(labelled={"source": "x"}, window=16, calibration_windows=4)
    from compress.text.labelled.as_text import text_of

    text = text_of(config, data, bundle.tokenizer)
    first = bundle.tokenizer.decode(text.train[:8])
    assert first.startswith("user:\n")
    assert {bundle.tokenizer.decode(w).startswith("user:\n") for w in text.calibration.tokens} == {True}


def test_chats_in_fewer_tokens_are_the_same_chats():
    bundle = chat_bundle()
    data = examples(bundle, 3)
    kept = sorted({int(i) for item in data.items for i in item.ids})
    own = {f"t{old}": new for new, old in enumerate(kept)}
    words = Translation({i: f"t{i}" for i in range(300)}, own, None, np.array(kept, np.int32))
    found = data.renumbered(words)
    for item, before in zip(found.items, data.items, strict=True):
        assert words.rows[item.ids].tolist() == before.ids.tolist()
        known = before.targets != UNKNOWN
        assert words.rows[item.targets[known]].tolist() == before.targets[known].tolist()
        assert (item.targets[~known] == UNKNOWN).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"augment": {"replace": 0.5}}, r"finetune\.augment: is for texts with labels, and chats have none"),
        ({"class_weights": "balanced"}, r"finetune\.class_weights: is for texts with labels"),
        ({"sampling": "balanced"}, r"finetune\.sampling: is for texts with labels"),
    ],
)
def test_what_chats_have_not(fields, words):
    bundle = chat_bundle()
    data = encoded(labelled(), (), bundle.tokenizer, 128)
    with pytest.raises(UserError, match=words):
        bundle.apply(compress.Finetune(**fields), labelled=data)


def test_a_special_token_that_the_model_has_no_row_for():
    bundle = chat_bundle()
    bundle.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    bundle.tokenizer.chat_template = PLAIN.replace("eos_token", "'<|im_end|>'")
    with pytest.raises(
        UserError, match=r"labelled: a row of tiny: holds '<\|im_end\|>', token 300, and the model"
    ):
        bundle.apply(compress.Finetune(epochs=1), labelled=labelled())


class TestRuns:
    @pytest.fixture
    def model(self, tmp_path):
        chat_bundle().save(tmp_path / "model")
        return tmp_path / "model"

    def recipe(self, folder, model, **changes):
        exports = ["export_onnx", *(["export_gguf"] if find_spec("llama_cpp") else [])]
        said = {
            "name": "chats", "threads": 1, "model": {"checkpoint": str(model)},
            "data": {"labelled": str(write_chats(folder / "chats.jsonl")), "window": 32},
            "base": [{"prune_magnitude": {"sparsity": 0.3}}, {"finetune": {**TUNED, "epochs": 4}}],
            "variants": {
                "int4": [{"quantize_gptq": {"format": "int4"}}, *exports],
                "fewer": ["prune_vocabulary"],
            },
            "measure": {"prefill_tokens": 16, "rounds": 1, "timing_seconds": 1},
            "report": {"prompt": "user:\nturn", "sample_tokens": 4},
        }  # fmt: skip
        path = folder / "chats.yaml"
        path.write_text(yaml.safe_dump({**said, **changes}, sort_keys=False), encoding="utf-8")
        return path

    def test_a_run_heals_quantizes_exports_and_judges_by_answers(self, model, tmp_path):
        path = self.recipe(tmp_path, model)
        planned = invoke("run", path, "-o", tmp_path / "run", "--dry-run")
        assert planned.code == 0, planned.err
        done = invoke("run", path, "-o", tmp_path / "run")
        assert done.code == 0, done.err
        results = {(r.variant, r.runtime): r for r in compress.read_results(tmp_path / "run/results.jsonl")}
        runtimes = {"torch", "onnxruntime", *(["llama.cpp"] if find_spec("llama_cpp") else [])}
        assert {runtime for name, runtime in results if name == "int4"} == runtimes
        base = compress.load(tmp_path / "run/base")
        from compress.artifact.labels import labelled_for, rows_of_labels

        judged = labelled_for(base.model, base.tokenizer, rows_of_labels(tmp_path / "chats.jsonl")).evaluation
        for name in ("base", "int4"):
            found = compress.load(tmp_path / "run" / name)
            with torch.no_grad():
                wanted = float(stock_loss(found.model, list(judged.items)))
            assert results[name, "torch"].nll == pytest.approx(wanted, rel=1e-4)
        for runtime in runtimes:
            own = results["int4", runtime]
            assert own.nll == pytest.approx(results["int4", "torch"].nll, abs=0.05)
            assert own.kl_to_base > 0
            assert own.delta_nll_ci95[0] <= own.delta_nll <= own.delta_nll_ci95[1]
        fewer = results["fewer", "torch"]
        assert fewer.nll <= results["base", "torch"].nll + 1e-4  # of fewer tokens the right one is likelier
        assert fewer.kl_to_base == pytest.approx(0, abs=1e-5)
        page = (tmp_path / "run/report.md").read_text()
        assert "Perplexity" in page
        asked = sum(int((item.targets != UNKNOWN).sum()) for item in judged.items)
        assert re.search(rf"tokens of answers, which alone count: [\d,]+ to train on, .+ {asked} to ju", page)
        again = compress.measure(
            tmp_path / "run/base", labelled=tmp_path / "chats.jsonl",
            protocol=compress.MeasureProtocol(threads=1, prefill_tokens=16, rounds=1),
        )  # fmt: skip
        assert [r.nll for r in again] == [results["base", "torch"].nll]

    def test_what_does_not_go(self, model, tmp_path):
        chat_bundle(None).save(tmp_path / "plain")
        path = self.recipe(tmp_path, tmp_path / "plain")
        assert "has no chat template" in refused("run", path, "-o", tmp_path / "a")
        path = self.recipe(tmp_path, model, base=[{"finetune": {"augment": {"replace": 0.1}}}])
        told = refused("run", path, "-o", tmp_path / "b", "--dry-run")
        assert "base.finetune.augment: is for texts with labels" in told
        from encoder_models import tiny_encoder

        tiny_encoder("bert").save(tmp_path / "bert")
        path = self.recipe(tmp_path, tmp_path / "bert", variants={})
        told = refused("run", path, "-o", tmp_path / "c", "--dry-run")
        assert (
            "rows of the kind 'chat' are learnt by a decoder (causal), and this model is an encoder" in told
        )
        told = refused("bench", tmp_path / "bert", "--labelled", tmp_path / "chats.jsonl", "-o", "r.jsonl")
        assert "which labels of the kind 'chat' do not judge" in told


def test_the_text_of_a_run_has_its_own_windows(tmp_path):
    """Beside other text chats only judge and are learnt."""
    bundle = chat_bundle()
    data = encoded(labelled(), (), bundle.tokenizer, 128)
    context = tiny_context(bundle, tmp_path)
    context = replace(context, data=replace(context.data, labelled=data))
    tuned = compress.Finetune(epochs=1, batch=8)(bundle, context)
    assert tuned.notes["examples"] == len(data.train)
