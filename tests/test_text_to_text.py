"""Texts that come of texts: cut, learnt, written and judged, against stock transformers and the libraries."""

import importlib.util
import math
from functools import partial

import numpy as np
import pytest
import sacrebleu
import torch
from export_models import word_tokenizer
from labelled_models import tiny_labeller
from rouge_score.rouge_scorer import RougeScorer
from seq2seq_models import tiny_seq2seq
from text_to_text_models import forced, text_examples, text_labels, text_rows
from training_set import tiny_bundle

from compress.errors import MissingExtra, UserError
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.forms import Forms
from compress.measure.changed_texts import CHARACTERS, changed_texts
from compress.measure.label_references import label_references
from compress.measure.quality import Scores, score, summarise
from compress.measure.text_references import LEAD, NEAREST
from compress.measure.turns import Target
from compress.measure.written import how_to_write, write_texts
from compress.models.create import Architecture, create
from compress.models.heads import labels_of
from compress.runtimes import open_runtime
from compress.runtimes.torch_runtime import TorchRuntime
from compress.tasks.registry import task_labelled, task_of
from compress.tasks.seq2seq import SEQ2SEQ
from compress.tasks.written import alike, metrics, row_scores
from compress.text.documents import Document
from compress.text.encode import encode
from compress.text.examples import Examples
from compress.text.labelled.as_text import documents_of
from compress.text.labelled.base import Labelled, Row
from compress.text.labelled.encoded import encoded

KINDS = ["t5", "bart"]
WANTED = ["Return the name of the file.", "Close it.", "Имя этого файла", "a b c d"]
TEXTS = ["Return name of a file.", "Close it.", "имя того файла", ""]


def lcs(a, b):
    """The longest common subsequence, from its definition."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


class TestScores:
    def test_rouge_l_is_that_of_its_definition_and_of_the_library(self):
        found = row_scores(TEXTS, WANTED)
        words = "return name of a file".split(), "return the name of the file".split()
        common = lcs(*words)
        p, r = common / len(words[0]), common / len(words[1])
        assert common == 4
        assert found.tolist() == pytest.approx([2 * p * r / (p + r), 1.0, 2 / 3, 0.0])
        stock = RougeScorer(["rougeL"])
        for place in (0, 1, 3):  # ASCII
            assert found[place] == stock.score(WANTED[place], TEXTS[place])["rougeL"].fmeasure
        assert stock.score(WANTED[2], TEXTS[2])["rougeL"].fmeasure == 0, "it leaves such letters out"

    def test_the_other_metrics_are_what_the_libraries_call_so(self):
        found = metrics(TEXTS, WANTED)
        stock = RougeScorer(["rouge1", "rouge2"])
        pairs = [(WANTED[place], TEXTS[place]) for place in (0, 1, 3)]
        for kind, name in (("rouge1", "rouge_1"), ("rouge2", "rouge_2")):
            own = metrics([text for _, text in pairs], [right for right, _ in pairs])[name]
            mean = np.mean([stock.score(*pair)[kind].fmeasure for pair in pairs])
            assert own == pytest.approx(mean)
        assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(TEXTS, [WANTED]).score / 100)
        assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, [WANTED]).score / 100)
        assert found["exact_match"] == 0.25
        assert alike(" a\n b ", "a b")

    def test_against_a_base_there_are_paired_differences_and_flips(self):
        def scores(texts, ended=True):
            return Scores(
                [1.0] * 4, [2] * 4, task="seq2seq", written=[(t, ended) for t in texts], wanted=WANTED
            )

        base, ours = scores([*WANTED[:2], "x", "y"]), scores(TEXTS, ended=False)
        alone, quality = summarise(base, None, 0), summarise(ours, base, 0)
        assert (alone.score_name, alone.score) == ("rouge_l", pytest.approx(0.5))
        assert (alone.flips, alone.delta_score) == (None, None)
        assert alone.metrics["not_ended"] == 0.0
        assert quality.metrics["not_ended"] == 1.0
        assert quality.nll == 0.5, "of eight tokens"
        before, now = (row_scores([t for t, _ in s.written], WANTED) for s in (base, ours))
        assert quality.delta_score == pytest.approx(float((now - before).mean()))
        low, high = quality.delta_score_ci95
        assert low <= quality.delta_score <= high
        assert (quality.flips, quality.flips_lost, quality.flips_gained) == (0.75, 0.25, 0.0)
        joined = Scores.joined([ours, ours])
        assert summarise(joined, None, 0).score == pytest.approx(quality.score)
        assert joined.wanted == WANTED * 2

    def test_windows_of_plain_text_have_no_score(self):
        found = summarise(Scores([1.0], [2], task="seq2seq"), None, 0)
        assert (found.nll, found.score, found.metrics) == (0.5, None, None)

    def test_texts_that_lost_most_are_shown_first(self):
        rows = [Row("w" * 400, right) for right in WANTED]
        examples = Examples("text", (), (), order=(0, 1, 2, 3), rows=tuple(rows))
        base, ours = (
            Scores([], [], task="seq2seq", written=[(text, True) for text in texts], wanted=WANTED)
            for texts in ([*WANTED[:3], "z"], TEXTS)
        )
        found = changed_texts(Target("small", "torch", None), ours, base, examples)
        assert (found.what, found.decisions, found.lost, found.gained, found.otherwise) == (
            "texts",
            4,
            2,
            0,
            1,
        )
        assert [flip.label for flip in found.worst] == [WANTED[2], WANTED[0]]
        assert (found.worst[0].before, found.worst[0].now) == (WANTED[2], TEXTS[2])
        assert found.worst[0].confidence_now == pytest.approx(2 / 3)
        assert len(found.worst[0].text) == CHARACTERS + 1
        assert changed_texts(Target("small", "torch", None), Scores([], []), base, examples) is None

    @pytest.mark.parametrize("library", ["rouge_score", "sacrebleu"])
    def test_a_library_that_is_missing_is_named_with_its_extra(self, library, monkeypatch, tmp_path):
        from text_to_text_models import write_rows

        from compress.artifact.labels import rows_of_labels

        file, known = write_rows(tmp_path / "rows.jsonl", text_rows()), importlib.util.find_spec
        monkeypatch.setattr(
            "compress.tasks.decisions.find_spec", lambda name: None if name == library else known(name)
        )
        with pytest.raises(MissingExtra, match=r"metrics"):
            rows_of_labels(file)


class TestExamples:
    def test_sources_and_targets_are_cut_counted_and_end(self):
        tokenizer = word_tokenizer(pad_token="w3")
        rows = [
            Row("w50 w51", "w70"),
            Row("w50 " * 9, "w70 w71"),
            Row("w50", "w70 " * 9),
            Row("w9", "w70 " * 6),
        ]
        cut = encode(rows, "text", (), tokenizer, 6)
        by_row = dict(zip(cut.order, cut.items, strict=True))
        assert by_row[0].ids.tolist() == [50, 51]
        assert by_row[0].targets.tolist() == [70, 1], "the end is learnt"
        assert by_row[1].ids.tolist() == [50] * 6
        assert by_row[2].targets.tolist() == [70] * 5 + [1]
        assert by_row[3].targets.tolist() == [70] * 5 + [1], "the end takes a word's place"
        assert (cut.cut, cut.length, cut.size) == (3, 6, 10 + 17)
        assert tokenizer.backend_tokenizer.truncation is None
        data = encoded(Labelled("x", "text", (), tuple(rows), (), tuple(rows[:1])), (), tokenizer, 6)
        assert data.notes["cut_off"] == {"train": 3, "heldout": 0, "evaluation": 0}
        assert data.notes["longest"] == 6

    def test_an_end_that_the_tokenizer_writes_is_not_written_twice_and_its_longest_text_heeded(self):
        shape = Architecture(family="t5", hidden=32, heads=2, intermediate=64, vocab_size=290, context=12,
                             sentinels=4)  # fmt: skip
        words = ["name", "files", "of", "and", "return", "more", "the", "value", "object", "quick", "lazy"]
        documents = [Document("a", f"{a}{b} {b}{a} {a} {b}\n" * 3) for a in words for b in words]
        _, tokenizer = create(shape, documents, 0)
        rows = [Row("name", "files and"), Row("return the name of " * 9, "name " * 30)]
        cut = encode(rows, "text", (), tokenizer, 2**31 - 1)
        assert all(len(item.ids) <= 12 and len(item.targets) <= 12 for item in cut.items)
        assert all(item.targets.tolist().count(tokenizer.eos_token_id) == 1 for item in cut.items)
        assert all(item.targets[-1] == tokenizer.eos_token_id for item in cut.items)
        assert cut.cut == 1
        assert tokenizer.decode(cut.items[0].targets, skip_special_tokens=True) == "files and"

    def test_a_tokenizer_without_an_end_is_refused(self):
        tokenizer = word_tokenizer(pad_token="w3")
        tokenizer.eos_token = None
        with pytest.raises(UserError, match="the tokenizer has no eos_token"):
            encode(text_rows(4), "text", (), tokenizer, 64)

    def test_they_come_back_from_their_file_as_they_were(self, tmp_path):
        cut = text_examples(tiny_seq2seq("t5"))
        cut.save(tmp_path / "e.npz")
        again = Examples.load(tmp_path / "e.npz")
        assert (again.sha256, again.kind, again.names) == (cut.sha256, "text", ())

    def test_training_text_holds_the_targets_of_training_rows_alone(self):
        labels = text_labels()
        texts = {document.text for document in documents_of(labels)}
        assert texts == {text for row in labels.train for text in (row.text, row.label)}


def test_an_encoder_decoder_is_the_task_of_such_rows():
    config = tiny_seq2seq("t5").model.config
    assert task_labelled("text") is SEQ2SEQ is task_of(config)
    assert labels_of(config) == (), "LABEL_0 and LABEL_1 stand in every configuration"


@pytest.fixture(scope="module", params=KINDS)
def opened(request, tmp_path_factory):
    """A model, and its artifact in both runtimes."""
    pytest.importorskip("onnxscript")
    bundle = forced(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    bundle.save(folder)
    write_artifact(bundle, folder / "onnx", Forms("token"))
    return bundle, folder, [TorchRuntime(folder, 1), open_runtime(folder / "onnx", "onnxruntime", 1)]


def stock_loss(model, item):
    """Summed over the target, of the text alone."""
    ids, labels = (torch.from_numpy(each.astype(np.int64))[None] for each in (item.ids, item.targets))
    with torch.inference_mode():
        return float(model(input_ids=ids, labels=labels).loss) * labels.numel()


def stock_text(bundle, item, limit, ends=(1, 2)):
    """What transformers writes, up to the end."""
    ids = torch.from_numpy(item.ids.astype(np.int64))[None]
    options = {"do_sample": False, "num_beams": 1, "min_length": 0, "eos_token_id": list(ends)}
    written = bundle.model.generate(ids, max_new_tokens=limit, **options)[0, 1:].tolist()
    end = next((place for place, token in enumerate(written) if token in ends), len(written))
    return written[:end], end < len(written)


class TestArtifacts:
    def test_the_loss_of_a_target_is_stock_transformers(self, opened):
        bundle, _, runtimes = opened
        examples = text_examples(bundle)
        wanted = [stock_loss(bundle.model, item) for item in examples.items]
        for runtime in runtimes:
            scores = score(runtime.logits, examples, task=runtime.task, together=4)
            assert scores.nats == pytest.approx(wanted, rel=1e-4)
            assert scores.tokens == [len(item.targets) for item in examples.items]

    def test_what_is_written_is_what_stock_transformers_generates(self, opened):
        bundle, folder, runtimes = opened
        examples = text_examples(bundle, 30, seed=3)
        how = how_to_write(folder, bundle.tokenizer, 9)
        assert how == {"limit": 9, "ends": [1, 2], "first": None}
        free = [stock_text(bundle, item, 9, (1,))[0] for item in examples.items]
        # random models hardly ever end by themselves, or at once: a token that some write and some do not
        often = {token: sum(token in ids for ids in free) for ids in free for token in ids}
        how["ends"] = [1, min(often, key=lambda token: abs(often[token] - 15))]
        wanted = [stock_text(bundle, item, 9, how["ends"]) for item in examples.items]
        assert {ended for _, ended in wanted} == {True, False} or bundle.model.config.model_type == "bart"
        assert len({len(ids) for ids, _ in wanted}) > 1 or bundle.model.config.model_type == "bart"
        for runtime in runtimes:
            for together in (1, 8):
                told = []
                found = write_texts(
                    runtime, examples, range(30), **how, together=together, advance=partial(told.append, 1)
                )
                assert found == wanted
                assert len(told) == 30
            assert write_texts(runtime, examples, range(4, 9), **how) == wanted[4:9]

    def test_a_token_that_is_forced_upon_a_text_begins_it(self, tmp_path):
        bundle = forced("bart", 9)
        bundle.save(tmp_path)
        examples, how = text_examples(bundle, 6), how_to_write(tmp_path, bundle.tokenizer, 5)
        found = write_texts(TorchRuntime(tmp_path, 1), examples, range(6), **how)
        assert found == [stock_text(bundle, item, 5) for item in examples.items]
        assert all(ids[0] == 9 for ids, _ in found)


def test_simple_answers_stand_beside():
    rows = [Row("def get_name(self): return self.name", "Return the name.")] * 3
    near = Row("def get_name(self): return self._name", "Get name.")
    other = Row("class Error: pass", "An error that is raised.")
    labels = Labelled("x", "text", (), (*rows, other), (), (near,))
    tokenizer = word_tokenizer(pad_token="w3")
    lead, nearest = label_references(encoded(labels, (), tokenizer, 64))
    assert (lead.name, nearest.name, lead.score_name) == (LEAD, NEAREST, "rouge_l")
    assert lead.score == pytest.approx(float(row_scores(["def get_name(self): return"], ["Get name."])[0]))
    assert nearest.score == pytest.approx(float(row_scores(["Return the name."], ["Get name."])[0]))
    assert nearest.metrics["exact_match"] == 0.0
    assert (lead.rows, nearest.rows) == (4, 4)
    data = encoded(labels, (), tokenizer, 64)
    assert label_references(data, earlier=[lead, nearest]) == [lead, nearest]


@pytest.mark.parametrize(
    ("bundle", "labels", "said"),
    [
        (
            lambda: tiny_labeller("class"),
            text_labels(),
            "rows of the kind 'text' are learnt by an encoder-d",
        ),
        (tiny_bundle, text_labels(), "encoder-decoder .seq2seq., and this model is a decoder"),
        (
            lambda: tiny_seq2seq("t5"),
            Labelled("x", "class", ("a", "b"), (Row("w5", "a"), Row("w6", "b")), (), (Row("w5", "a"),)),
            "rows of the kind 'class' are learnt by a classifier .*, and this model is an encoder-decoder",
        ),
    ],
)
def test_labels_of_another_kind_of_model_are_refused(bundle, labels, said):
    from compress.passes.finetune import Finetune

    with pytest.raises(UserError, match=said):
        bundle().apply(Finetune(epochs=1), labelled=labels)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"class_weights": "balanced"}, "class_weights: labels of the kind 'text' have no classes"),
        ({"sampling": "balanced"}, "sampling: balanced is for one label per text, not 'text'"),
    ],
)
def test_texts_have_no_classes(field, said):
    from compress.passes.finetune import Finetune

    with pytest.raises(UserError, match=said):
        tiny_seq2seq("t5").apply(Finetune(epochs=1, **field), labelled=text_labels())


def test_nothing_of_it_is_downloaded(monkeypatch):
    import socket

    def refuse(*args, **more):
        raise AssertionError("a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert math.isclose(metrics(["a b."], ["a b."])["rouge_2"], 1.0)
