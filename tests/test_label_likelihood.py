"""A decoder that labels by the likelihood of each label after a prompt: by stock models, and whole runs."""

import csv
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from chat_models import chat_bundle
from cli_helpers import invoke, refused
from export_models import exported, word_tokenizer
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, f1_score

import compress
from compress.measure.label_likelihood import LabelLikelihood
from compress.measure.quality import score, summarise
from compress.runtimes.torch_runtime import TorchRuntime
from compress.tasks.prompted import PROMPTED
from compress.tasks.registry import TASKS, task_labelled, task_named
from compress.text.encode import asked_by, encode
from compress.text.examples import Examples
from compress.text.labelled.base import Row
from compress.text.labelled.config import LabelledConfig
from compress.text.prompts import Prompt, checked, choices_of, prompted

NAMES = ("alpha", "omega sigma", "gamma", "beta delta omega")
PROMPT = Prompt("Text: {text}\nTopic: {label}")
PROTOCOL = compress.MeasureProtocol(threads=1, prefill_tokens=16, rounds=1, timing_seconds=1)


def rows(count=12, seed=0):
    draw = np.random.default_rng(seed)
    words = "def return alpha beta gamma delta omega sigma".split()
    return [
        Row(" ".join(draw.choice(words, draw.integers(2, 7))) + f" {n}", NAMES[n % len(NAMES)])
        for n in range(count)
    ]


def asked(bundle, prompt=PROMPT, count=12, longest=128):
    return asked_by(
        encode(rows(count), "class", NAMES, bundle.tokenizer, 128), prompt, bundle.tokenizer, longest
    )


def by_hand(bundle, examples, per_token):
    """ln p of each label by a forward pass of stock transformers over the prompt and the label alone."""
    found = []
    for item in examples.items:
        scores = []
        for choice in examples.choices:
            ids = torch.from_numpy(np.concatenate([item.ids, choice]).astype(np.int64))[None]
            with torch.inference_mode():
                likely = bundle.model(ids).logits[0].log_softmax(-1)
            n = len(choice)
            tokens = [float(likely[-n - 1 + k, int(choice[k])]) for k in range(n)]
            scores.append(np.mean(tokens) if per_token else np.sum(tokens))
        found.append(scores)
    return np.array(found)


class Alone:
    """A runtime that joins no rows, as llama.cpp's."""

    def __init__(self, runtime):
        self.logits = runtime.logits


@pytest.mark.parametrize("per_token", [True, False])
def test_likelihoods_are_those_of_a_stock_forward_pass(tmp_path, per_token):
    bundle = chat_bundle()
    examples = asked(bundle, Prompt(PROMPT.template, per_token))
    assert sorted({len(choice) for choice in examples.choices}) > [1]
    bundle.save(tmp_path / "m")
    wanted = by_hand(bundle, examples, per_token)
    runtime = TorchRuntime(tmp_path / "m", 1)
    for opened in (runtime, Alone(runtime), exported(bundle, tmp_path / "onnx")):
        forward = LabelLikelihood(opened, examples)
        found = np.stack([forward(item.ids[None])[0, 0] for item in examples.items])
        assert found == pytest.approx(wanted, abs=2e-4)


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_is_asked_too(tmp_path):
    from compress.export.gguf.artifact import write_gguf
    from compress.runtimes.llama_cpp_runtime import LlamaCppRuntime

    bundle = chat_bundle()
    examples = asked(bundle, count=4)
    write_gguf(bundle, tmp_path / "m.gguf")
    forward = LabelLikelihood(LlamaCppRuntime(tmp_path / "m.gguf", 1), examples)
    found = np.stack([forward(item.ids[None])[0, 0] for item in examples.items])
    assert found == pytest.approx(by_hand(bundle, examples, True), abs=0.05)


def test_the_score_is_what_scikit_learn_says_of_the_likeliest_label(tmp_path):
    bundle = chat_bundle()
    examples = asked(bundle)
    bundle.save(tmp_path / "m")
    examples.save(tmp_path / "e.npz")
    again = Examples.load(tmp_path / "e.npz")
    assert (again.prompt, again.sha256) == (PROMPT, examples.sha256)
    forward = LabelLikelihood(TorchRuntime(tmp_path / "m", 1), again)
    found = summarise(score(forward, again, task=PROMPTED), None, None)
    likely = by_hand(bundle, examples, True)
    right = [int(item.targets[0]) for item in examples.items]
    assert found.score == pytest.approx(accuracy_score(right, likely.argmax(-1)))
    macro = f1_score(right, likely.argmax(-1), average="macro", zero_division=0)
    assert found.metrics["macro_f1"] == pytest.approx(macro)
    assert found.score_ci95[0] <= found.score <= found.score_ci95[1]
    nll = -log_softmax(likely, axis=-1)[np.arange(len(right)), right].mean()
    assert found.nll == pytest.approx(nll, abs=1e-4)
    assert task_named("label-likelihood") is PROMPTED
    assert PROMPTED not in TASKS
    assert task_labelled("class") is not PROMPTED


def test_tokens_are_those_of_the_whole_text():
    tokenizer = chat_bundle().tokenizer
    texts = [(row.text, None) for row in rows()]
    found = prompted(texts, NAMES, PROMPT, tokenizer, 128)
    for (text, _), ids in zip(texts, found.prompts, strict=True):
        for name, choice in zip(NAMES, found.choices, strict=True):
            whole = tokenizer(f"Text: {text}\nTopic: {name}")["input_ids"]
            assert [*ids.tolist(), *choice.tolist()] == whole
    for one, other in pairwise(sorted(found.prompts, key=len)):
        assert len(one) <= len(other)
    (own,) = choices_of(["alpha"], Prompt("{text} {label}"), tokenizer)
    assert tokenizer.decode(own) == " alpha"


def test_long_texts_lose_their_end_and_are_counted():
    tokenizer = chat_bundle().tokenizer
    long = ("alpha " * 90, "delta")
    both = Prompt("{text} | {pair} | {label}")
    found = prompted([("alpha", "beta"), long], NAMES, both, tokenizer, 48)
    assert found.cut == 1
    most = 48 - max(map(len, found.choices))
    assert most - 2 <= len(found.prompts[1]) <= most
    shown = tokenizer.decode(found.prompts[1])
    assert shown.startswith("alpha alpha alpha")
    assert shown.endswith("| delta |")


def test_what_a_tokenizer_puts_before_every_text_comes_first():
    from tokenizers import processors

    tokenizer = chat_bundle().tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    (ids,) = prompted([("alpha", None)], NAMES, PROMPT, tokenizer, 64).prompts
    assert ids[0] == 0
    assert tokenizer.decode(ids[1:]) == "Text: alpha\nTopic:"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("Topic: {label}", "has no {text}"),
        ("{text}", r"must end with \{label\}, and have it once"),
        ("{text} {label}.", r"must end with \{label\}"),
        ("{label} {text} {label}", "have it once"),
        ("{text}{label}", r"\{label\} follows the text at once"),
        ("{text} {topic} {label}", r"\{topic\} is none of \{text\}, \{pair\}, \{label\}"),
        ("{text.__class__} {label}", r"\{text.__class__\} is none of"),
        ("{text[0]} {label}", "is none of"),
        ("{} {text} {label}", r"\{\} is none of"),
        ("{text!r} {label}", "has a form or a conversion"),
        ("{text:>9} {label}", "has a form or a conversion"),
        ("{text {label}", "write {{ and }} for braces"),
    ],
)
def test_templates_that_are_none(template, words):
    with pytest.raises(ValueError, match=words):
        checked(template)
    with pytest.raises(ValueError, match=words):
        LabelledConfig(source="x.csv", template=template)


def test_braces_are_written_twice():
    assert Prompt(checked("{{{text}}} {label}")).before("a{b}", None) == "{a{b}} "


@pytest.mark.parametrize(
    ("template", "names", "longest", "words"),
    [
        ("{text} {pair} {label}", NAMES, 64, "has {pair}, and there is none"),
        (
            "a long template " * 9 + PROMPT.template,
            NAMES,
            32,
            r"takes \d+ tokens without a text, where .+ for",
        ),
    ],
)
def test_what_cannot_be_asked(template, names, longest, words):
    with pytest.raises(compress.UserError, match=rf"^labelled\.template: .*{words}"):
        prompted([("alpha beta", None)], names, Prompt(template), chat_bundle().tokenizer, longest)


def test_labels_that_a_model_cannot_tell_apart():
    tokenizer, prompt = word_tokenizer(), Prompt("w5 {text} w6 {label}")
    with pytest.raises(compress.UserError, match="'yes' and 'no' are the same tokens to this model"):
        choices_of(["w7", "yes", "no"], prompt, tokenizer)
    with pytest.raises(compress.UserError, match="the label 'w7' melts into what comes before it"):
        choices_of(["w7"], Prompt("{text} w6{label}"), tokenizer)
    with pytest.raises(compress.UserError, match="the label ' ' has no token of its own"):
        choices_of(["w7", " "], prompt, tokenizer)


def test_pairs_want_both_texts():
    with pytest.raises(compress.UserError, match="has no {pair}, and there are two texts in a row"):
        prompted([("a", "b")], NAMES, PROMPT, chat_bundle().tokenizer, 64)


class TestRuns:
    @pytest.fixture
    def place(self, tmp_path):
        chat_bundle().save(tmp_path / "decoder")
        with (tmp_path / "rows.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("text", "label"), *((r.text, r.label) for r in rows(60))])
        return tmp_path

    def recipe(self, place, **changes):
        said = {
            "name": "asked", "threads": 1, "model": {"checkpoint": str(place / "decoder")},
            "data": {
                "labelled": {"source": str(place / "rows.csv"), "template": PROMPT.template},
                "window": 16,
            },
            "measure": {"prefill_tokens": 16, "rounds": 1, "timing_seconds": 1, "encoder_seconds": 0},
            "report": {"prompt": "def", "sample_tokens": 2},
        }  # fmt: skip
        path = place / "asked.yaml"
        path.write_text(yaml.safe_dump({**said, **changes}, sort_keys=False), encoding="utf-8")
        return path

    def test_a_decoder_is_judged_so_in_every_runtime(self, place):
        variants = {
            "int4": [{"quantize_round": {"format": "int4"}}, "export_onnx"],
            "fewer": ["prune_vocabulary"],
        }
        done = invoke("run", self.recipe(place, variants=variants), "-o", place / "run")
        assert done.code == 0, done.err
        results = {(r.variant, r.runtime): r for r in compress.read_results(place / "run/results.jsonl")}
        assert set(results) == {(v, "torch") for v in ("base", "int4", "fewer")} | {("int4", "onnxruntime")}
        base, small = results["base", "torch"], results["int4", "torch"]
        assert base.score_name == "accuracy"
        assert small.delta_score == pytest.approx(small.score - base.score)
        assert results["int4", "onnxruntime"].kl_to_base == pytest.approx(small.kl_to_base, abs=1e-3)
        assert small.kl_to_base > 0
        assert 0 <= small.flips <= 1
        # of fewer tokens the same are somewhat likelier: labels are cut as before, and decided alike
        assert results["fewer", "torch"].flips <= 0.25
        page = (place / "run/report.md").read_text()
        assert "TF-IDF and logistic regression" in page
        told = invoke(
            "bench", place / "run/base", "--labelled", place / "rows.csv", "--template", PROMPT.template,
            "-o", place / "r.jsonl",
        )  # fmt: skip
        assert told.code == 0, told.err
        assert compress.read_results(place / "r.jsonl")[0].score == base.score

    def test_without_a_template_a_decoder_is_judged_by_the_texts(self, place):
        plain = {"labelled": str(place / "rows.csv"), "window": 16}
        done = invoke("run", self.recipe(place, data=plain), "-o", place / "run")
        assert done.code == 0, done.err
        (base,) = compress.read_results(place / "run/results.jsonl")
        assert base.nll > 0
        assert (base.score, base.bits_per_byte) == (None, None), (
            "of the beginnings of texts no bytes are known"
        )

    def test_a_decoder_stands_beside_a_classifier(self, place):
        path = self.recipe(
            place, base=[{"finetune": {"epochs": 1, "batch": 16}}],
            report={"prompt": "def", "sample_tokens": 2, "likelihood": str(place / "decoder")},
        )  # fmt: skip
        done = invoke("run", path, "-o", place / "run")
        assert done.code == 0, done.err
        assert "for the likeliest of 4 labels of 12 texts" in done.out + done.err
        run = compress.api.load_run(place / "run")[0]
        _, _, decoder = run.label_references
        assert (decoder.name, decoder.rows) == ("likeliest label after a prompt, decoder", 0)
        bundle = compress.load(place / "decoder")
        from compress.artifact.labels import labelled_for, rows_of_labels

        texts = labelled_for(bundle.model, bundle.tokenizer, rows_of_labels(place / "rows.csv")).evaluation
        examples = asked_by(texts, PROMPT, bundle.tokenizer, 128)
        likely = by_hand(bundle, examples, True).argmax(-1)
        right = [int(item.targets[0]) for item in examples.items]
        assert decoder.score == pytest.approx(accuracy_score(right, likely))
        assert decoder.score_ci95[0] <= decoder.score <= decoder.score_ci95[1]
        again = invoke("run", path, "-o", place / "run")
        assert again.code == 0, again.err
        assert "for the likeliest" not in again.out + again.err
        assert compress.api.load_run(place / "run")[0].label_references == run.label_references

    def test_what_does_not_go(self, place):
        def told(**changes):
            return refused("run", self.recipe(place, **changes), "-o", place / "no", "--dry-run")

        tuned = {"base": [{"finetune": {"epochs": 1}}]}
        plain = {"labelled": str(place / "rows.csv"), "window": 16}
        beside = {"report": {"likelihood": str(place / "decoder")}}
        assert "so nobody is asked; name a decoder under report.likelihood" in told(**tuned)
        assert "is asked by data.labelled.template, which is not given" in told(data=plain, **tuned, **beside)
        assert "is itself asked by the template" in told(**beside)
        assert "is neither a directory" in told(**tuned, report={"likelihood": "/nowhere"})
        from encoder_models import tiny_encoder

        tiny_encoder("bert").save(place / "bert")
        assert "bert is an encoder (masked), which finds no label likely" in told(
            **tuned, report={"likelihood": str(place / "bert")}
        )
        assert "an encoder (masked) is not asked so, only a decoder" in told(
            model={"checkpoint": str(place / "bert")}
        )
        wrong = {"labelled": {"source": str(place / "rows.csv"), "template": "{text}"}, "window": 16}
        assert "data.labelled.template: must end with {label}" in told(data=wrong)
        both = ("--labelled", place / "rows.csv", "--template", PROMPT.template)
        assert "only a decoder is asked so" in refused("bench", place / "bert", *both)
        assert "--template: asks for labels" in refused(
            "bench", place / "bert", "--template", "{text} {label}"
        )
