"""Structured pruning of encoders: heads for labels stay as they are, and say what a unit is worth."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from taught_models import LABELS, labelled_context, labelled_examples, tiny_body, tiny_classifier
from test_prune_structured import kill

from compress.errors import UserError
from compress.models.heads import labels_of
from compress.passes.distill import Distill
from compress.passes.prune_structured import PruneStructured
from compress.structured import costs as costs_module
from compress.structured import probes
from compress.structured.probes import Prober
from compress.structured.structure import find_structure
from compress.tasks.base import UNKNOWN
from compress.tasks.registry import task_of
from compress.text.labelled.encoded import LabelledData

FAMILIES = ["bert", "roberta", "distilbert", "modernbert"]
IDS = torch.arange(10, 30)[None]
WINDOWS = torch.randint(10, 90, (6, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answer(bundle, ids=IDS):
    return bundle.model(input_ids=ids)[0]


def planted(bundle, size=0.0):
    """Half of the neurons of each block next to dead, others in every block."""
    for sublayer in find_structure(bundle.model).of("neurons"):
        order = torch.randperm(sublayer.units, generator=torch.Generator().manual_seed(sublayer.block))
        kill(bundle.model, sublayer, order[: sublayer.units // 2].tolist(), size)


def labelled(kind):
    return LabelledData("labels", *(labelled_examples(kind, 96, seed) for seed in range(3)))


@pytest.mark.parametrize("kind", ["class", "tags"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dead_neurons_go_and_the_head_stays(family, kind, tmp_path):
    bundle = tiny_classifier(kind, family)
    planted(bundle)
    result = PruneStructured(neurons=0.5, multiple_of=1)(bundle, labelled_context(kind, tmp_path, bundle))
    torch.testing.assert_close(answer(result), answer(bundle), rtol=1e-3, atol=1e-4)
    assert labels_of(result.model.config) == labels_of(bundle.model.config)
    heads = [name for name in dict(bundle.model.named_parameters()) if name.startswith("classifier")]
    assert heads
    for name in heads:
        assert torch.equal(result.model.get_parameter(name), bundle.model.get_parameter(name))
    result.save(tmp_path / "pruned")
    kinds = {"class": "SequenceClassification", "tags": "TokenClassification"}
    stock = getattr(transformers, f"AutoModelFor{kinds[kind]}").from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, answer(result), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("importance", ["taylor", "kl"])
@pytest.mark.parametrize("kind", list(LABELS))
def test_labels_say_which_neurons_do_next_to_nothing(kind, importance, tmp_path):
    """With labelled texts, and without any."""
    bundle = tiny_classifier(kind)
    planted(bundle, 1e-3)
    step = PruneStructured(neurons=0.5, importance=importance, refit=None, multiple_of=1)
    for given in (kind, None):
        result = step(bundle, labelled_context(given, tmp_path, bundle))
        torch.testing.assert_close(answer(result), answer(bundle), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel"])
def test_encoders_without_labels_are_judged_by_what_they_give(name, tmp_path):
    bundle = tiny_body(name)
    planted(bundle, 1e-3)
    context = labelled_context(None, tmp_path, bundle)
    step = PruneStructured(neurons=0.5, importance="kl", refit=None, multiple_of=1)
    torch.testing.assert_close(answer(step(bundle, context)), answer(bundle), rtol=1e-2, atol=2e-2)
    taylor = PruneStructured(neurons=0.5, importance="taylor", refit=None, multiple_of=1)
    if name == "BertModel":
        with pytest.raises(UserError, match=r"importance: 'taylor' needs a loss, and an encoder"):
            taylor(bundle, context)
    else:
        torch.testing.assert_close(answer(taylor(bundle, context)), answer(bundle), rtol=1e-2, atol=2e-2)


def softmax(z):
    return torch.softmax(z.double(), -1)


def defined(kind, z, y, targets):
    """The loss of z, and how far z is from y."""
    if kind == "number":
        return (z - targets) ** 2, (z - y) ** 2
    if kind == "classes":
        return F.binary_cross_entropy_with_logits(z, targets.double()), bernoulli(z, y)
    z, y = z.view(-1, z.shape[-1]), y.view(-1, z.shape[-1])
    p, q = softmax(y), softmax(z)
    return -q[torch.arange(len(z)), targets].log().mean(), (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("kind", list(LABELS))
def test_losses_and_distances_of_labelled_texts_equal_their_definitions(kind):
    first, second = tiny_classifier(kind), tiny_classifier(kind, seed=3)
    task, data = task_of(first.model.config), labelled(kind)
    texts = Prober(data).texts(first.model, WINDOWS)
    assert len(texts) == 64
    for text in texts[:4]:
        example = next(e for e in data.train.items if np.array_equal(e.ids, text.inputs["input_ids"][0]))
        targets = torch.from_numpy(example.targets)
        z, y = (answer(b, text.inputs["input_ids"])[0].double() for b in (second, first))
        if kind == "tags":
            z, y, targets = (each[targets != UNKNOWN] for each in (z, y, targets))
        expected, apart = defined(kind, z, y, targets)
        with torch.no_grad():
            assert float(probes.loss(second.model, text)) == pytest.approx(float(expected), rel=1e-4)
            pair = [probes.answer(b.model, text) for b in (first, second)]
        assert probes.distance(task, *pair) == pytest.approx(float(apart), rel=1e-3, abs=1e-6)


def bernoulli(z, y):
    q, p = torch.sigmoid(z), torch.sigmoid(y)
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


@pytest.mark.parametrize("kind", ["class", "classes", "number"])
def test_one_answer_to_all_texts_is_the_scale(kind):
    bundle = tiny_classifier(kind)
    texts = Prober(labelled(kind)).texts(bundle.model, WINDOWS)[:9]
    with torch.no_grad():
        answers = [probes.answer(bundle.model, text) for text in texts]
        z = torch.cat([answer(bundle, text.inputs["input_ids"]) for text in texts]).double()
    if kind == "number":
        expected = z.var(correction=0)
    elif kind == "class":
        p = softmax(z)
        expected = (p * (p / p.mean(0)).log()).sum(-1).mean()
    else:
        p = torch.sigmoid(z)
        m = p.mean(0)
        expected = (p * (p / m).log() + (1 - p) * ((1 - p) / (1 - m)).log()).mean()
    found = probes.one_answer(task_of(bundle.model.config), answers)
    assert found == pytest.approx(float(expected), rel=1e-3)


def test_embeddings_are_apart_by_their_angle():
    first, second = tiny_body("BertModel"), tiny_body("BertModel", seed=2)
    task, texts = task_of(first.model.config), Prober().texts(first.model, WINDOWS)
    with torch.no_grad():
        pairs = [[probes.answer(b.model, text) for b in (first, second)] for text in texts]
        e = [answer(b, WINDOWS).mean(1).double() for b in (first, second)]
    expected = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(*e, strict=True)]
    assert [probes.distance(task, *pair) for pair in pairs] == pytest.approx(expected, rel=1e-3)
    unit = e[0] / e[0].norm(dim=1, keepdim=True)
    mean = unit.mean(0) / unit.mean(0).norm()
    found = probes.one_answer(task, [pair[0] for pair in pairs])
    assert found == pytest.approx(float(1 - (unit @ mean).mean()), rel=1e-3)
    assert probes.unit(task) == "1 - cosine"


@pytest.mark.parametrize("target", [{"parameters": 0.8}, {"bytes": 0.8, "take": ["neurons", "layers"]}])
@pytest.mark.parametrize("kind", ["class", "number", None])
def test_targets_are_met_by_encoders_of_every_kind(kind, target, tmp_path):
    bundle = tiny_body("BertModel", blocks=3) if kind is None else tiny_classifier(kind, blocks=3)
    context = labelled_context(kind, tmp_path, bundle)
    step = PruneStructured(target={**target, "shapes": 2, "fit_windows": 1}, multiple_of=1, refit=None)
    if "take" in target:  # heads cannot go alone: neurons alone need no judge
        with pytest.raises(UserError, match=r"16 windows to fit and 16 to judge are more than the 8"):
            step(bundle, context)
    context.data.__dict__["calibration"] = more_windows(context.data.calibration)
    result = step(bundle, context)
    sizes = [sum(p.numel() for p in b.model.parameters()) for b in (bundle, result)]
    assert 0.7 < sizes[1] / sizes[0] <= 0.81
    assert all(math.isfinite(value) for value in result.notes["kl_of_shapes_tried"].values())
    assert torch.isfinite(answer(result)).all()


def more_windows(windows):
    from dataclasses import replace

    return replace(windows, tokens=np.tile(windows.tokens, (6, 1)))


def test_a_latency_is_that_of_a_text_and_bounded_by_labels(tmp_path, monkeypatch):
    def shares(model, whole, rounds=8):
        sizes = [sum(p.numel() for p in each.parameters()) for each in (model, whole)]
        return sizes[0] / sizes[1], [sizes[0] / sizes[1]] * rounds

    monkeypatch.setattr(costs_module, "decode_shares", shares)
    bundle = tiny_classifier("class", blocks=3)
    context = labelled_context("class", tmp_path, bundle)
    context.data.__dict__["calibration"] = more_windows(context.data.calibration)
    target = {"latency": 0.85, "take": ["neurons"], "largest_loss": 5.0, "fit_windows": 1}
    notes = PruneStructured(target=target, multiple_of=1)(bundle, context).notes["target"]
    assert notes["measured"].startswith("a text of 64 tokens in torch")
    assert 0 <= notes["loss"] < 5.0
    strict = PruneStructured(target={**target, "largest_loss": 1e-9}, multiple_of=1)
    with pytest.raises(UserError, match=r"loses \S+ nats per text, beyond largest_loss 1e-09"):
        strict(bundle, context)


@pytest.mark.parametrize("head", ["labels", "embedding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_width_go_together(family, head, tmp_path):
    """Stock configurations of encoders have no field for the width of a head; poolers go with the width."""
    names = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "modernbert": "ModernBert"}
    labels = head == "labels"
    bundle = tiny_classifier("class", family) if labels else tiny_body(f"{names[family]}Model")
    context = labelled_context("class" if labels else None, tmp_path, bundle)
    result = PruneStructured(heads=0.5, width=0.5, multiple_of=1)(bundle, context)
    config = result.model.config
    assert (config.num_attention_heads, config.hidden_size) == (2, 16)
    assert config.num_labels == bundle.model.config.num_labels
    assert torch.isfinite(answer(result)).all()


def test_channels_inside_a_head_that_hold_nothing_go_first(tmp_path):
    """The stream's own channels beside: those that are dead in all that reads and writes them."""
    bundle = tiny_classifier("class", "distilbert")
    found = find_structure(bundle.model)
    (inside,) = found.inside_heads
    assert {part.parameter for part in inside} == {
        "pre_classifier.weight", "pre_classifier.bias", "classifier.weight",
    }  # fmt: skip
    dead = torch.arange(0, 32, 2)
    with torch.no_grad():
        bundle.model.pre_classifier.weight[dead] = 0
        bundle.model.pre_classifier.bias[dead] = 0
        bundle.model.classifier.weight[:, dead] = 0
    result = PruneStructured(heads=0.5, width=0.5, multiple_of=1)(
        bundle, labelled_context("class", tmp_path, bundle)
    )
    assert torch.equal(result.model.classifier.weight, bundle.model.classifier.weight[:, 1::2])


def test_a_target_takes_heads_with_their_width_where_it_may(tmp_path):
    bundle = tiny_classifier("class")
    context = labelled_context("class", tmp_path, bundle)
    context.data.__dict__["calibration"] = more_windows(context.data.calibration)
    target = {"parameters": 0.45, "take": ["neurons", "heads", "width"], "shapes": 3, "fit_windows": 1}
    result = PruneStructured(target=target, multiple_of=1, refit=None)(bundle, context)
    heads, width = result.notes["left"]["heads"], result.notes["left"]["width"]
    assert (heads < 4) == (width < 32)
    assert width == 8 * heads
    sizes = [sum(p.numel() for p in b.model.parameters()) for b in (bundle, result)]
    assert sizes[1] / sizes[0] <= 0.45
    assert result.notes["target"]["reached"] == pytest.approx(sizes[1] / sizes[0])
    with pytest.raises(ValueError, match="width goes with heads"):
        PruneStructured(target={"parameters": 0.5, "take": ["neurons", "width"]})


def test_a_pruned_classifier_heals_by_its_teacher(tmp_path):
    bundle = tiny_classifier("class")
    context = labelled_context("class", tmp_path, bundle)
    pruned = PruneStructured(neurons=0.75, blocks=0.5, multiple_of=1, refit=None)(bundle, context)
    step = Distill(
        epochs=4.0, batch=16, heldout_points=1, optimizer="adamw", learning_rate=3e-3, cross_entropy=0.0,
        stop_by="loss",
    )  # fmt: skip
    healed = step(pruned, context)
    ids = torch.from_numpy(context.data.heldout.tokens).long()

    def apart(model):
        p, q = (answer(b, ids).log_softmax(-1) for b in (bundle, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert apart(healed) < 0.8 * apart(pruned)
