"""Prompts of different lengths in one batch, padded on any side, give what each gives alone."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_models import MODELS, exported, quantized, tiny_bundle, tokens, torch_logits

from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.cache import cache_scales
from compress.export.onnx.forms import Forms
from compress.formats import Int4

LENGTHS = (3, 12, 7)
WIDTH = 15  # of the batch: no row fills it
PAD = 1
SIDES = ["left", "right", "both"]


class Batch:
    """A padded batch through the graph itself, with a mask and growing arrays as cache."""

    def __init__(self, folder):
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = [x for x in self.session.get_inputs() if x.name.startswith("past_key_values")]
        self.names = ["logits", *(x.name.replace("past_key_values", "present") for x in self.inputs)]
        self.past = {}

    def run(self, ids, mask, keep):
        past = self.past or {
            x.name: np.zeros(
                (len(ids), x.shape[1], 0, x.shape[3]), np.int8 if x.type == "tensor(int8)" else np.float32
            )
            for x in self.inputs
        }
        feed = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64), **past}
        logits, *present = self.session.run(self.names, {**feed, "logits_to_keep": np.asarray([keep])})
        self.past = {x.name: value for x, value in zip(self.inputs, present, strict=True)}
        return logits


def padded(rows, longest, side="right"):
    """Ids and mask (rows, longest)."""
    ids = np.full((len(rows), longest), PAD)
    mask = np.zeros((len(rows), longest))
    for i, row in enumerate(rows):
        start = {"right": 0, "left": longest - len(row), "both": (longest - len(row)) // 2}[side]
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return ids, mask


def rows_and_following():
    """Prompts, and what is written after each, (rows, 5)."""
    return [tokens(1, length, seed=length)[0] for length in LENGTHS], tokens(len(LENGTHS), 5, seed=99)


def largest_difference(folder, rows, following, side, alone):
    """Relative, of a batch, prompts at once and then token by token, to the logits of each text `alone`."""
    batch = Batch(folder)
    ids, mask = padded(rows, WIDTH, side)
    steps = [batch.run(ids, mask, keep=1)[:, -1]]
    for step in range(following.shape[1]):
        mask = np.concatenate((mask, np.ones((len(rows), 1))), axis=1)
        steps.append(batch.run(following[:, step : step + 1], mask, keep=1)[:, -1])
    found = np.stack(steps, axis=1)  # (rows, 1 + following, vocabulary)
    worst = 0.0
    for i, row in enumerate(rows):
        expected = alone(np.concatenate((row, following[i]))[None])[0, len(row) - 1 :]
        worst = max(worst, float(np.abs(found[i] - expected).max() / np.abs(expected).max()))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_on_every_side_each_row_is_what_stock_transformers_says_of_it_alone(name, tmp_path):
    """Float and codes: one writes tokens flat, the other as they are."""
    plain = tiny_bundle(name)
    rows, following = rows_and_following()
    for kind, bundle in (("float", plain), ("codes", quantized(plain, Int4(group=32)))):
        exported(bundle, tmp_path / kind, Forms(accuracy_level=0))

        def alone(ids, model=bundle.model):
            return torch_logits(model, ids)

        for side in SIDES:
            assert largest_difference(tmp_path / kind, rows, following, side, alone) < 1e-5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_of_codes(name, side, tmp_path):
    bundle = tiny_bundle(name)
    write_artifact(bundle, tmp_path, Forms(), cache_scales(bundle.model, tokens(4, 40, seed=9)))

    def alone(ids):
        return Batch(tmp_path).run(ids, np.ones(ids.shape), keep=0)

    assert largest_difference(tmp_path, *rows_and_following(), side, alone) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window", "gemma2", "phi", "gpt_neox"])
def test_a_mask_may_close_up_when_the_text_grows(name, tmp_path):
    """Ones behind each text instead of behind its padding."""
    bundle = tiny_bundle(name)
    exported(bundle, tmp_path)
    rows, following = rows_and_following()
    batch = Batch(tmp_path)
    found = [batch.run(*padded(rows, max(LENGTHS)), keep=1)[:, -1]]
    for step in range(5):
        _, mask = padded([np.ones(length + step + 1) for length in LENGTHS], max(LENGTHS) + step + 1)
        found.append(batch.run(following[:, step : step + 1], mask, keep=1)[:, -1])
    for i, row in enumerate(rows):
        expected = torch_logits(bundle.model, np.concatenate((row, following[i]))[None])[0, len(row) - 1 :]
        assert np.abs(np.stack(found)[:, i] - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_padded_on_the_left_in_chunks(name, tmp_path):
    bundle = tiny_bundle(name)
    exported(bundle, tmp_path)
    row = tokens(1, 12)
    ids = np.concatenate((np.full((1, 3), PAD), row), axis=1)
    mask = (np.arange(15) >= 3)[None]
    expected = torch_logits(bundle.model, row)[0]
    for keep in (0, 1):
        batch = Batch(tmp_path)
        parts = [batch.run(ids[:, i : i + 5], mask[:, : i + 5], keep)[0] for i in range(0, 15, 5)]
        wanted = expected if keep == 0 else expected[[1, 6, 11]]
        found = np.concatenate(parts)[-len(wanted) :]
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("side", SIDES)
def test_more_positions_than_the_last(side, tmp_path):
    runtime = exported(tiny_bundle("llama"), tmp_path)
    rows, _ = rows_and_following()
    ids, mask = padded(rows, max(LENGTHS), side)
    four = Batch(tmp_path).run(ids, mask, keep=4)
    everything = Batch(tmp_path).run(ids, mask, keep=0)
    for i, row in enumerate(rows):
        expected = runtime.logits(row[None])[0]
        tolerance = 1e-5 * np.abs(expected).max()
        kept = expected[-4:]
        of_four = {"right": slice(0, len(kept)), "left": slice(-len(kept), None), "both": slice(None)}[side]
        if len(row) >= 4 or side != "both":
            assert np.abs(four[i][of_four] - kept).max() < tolerance
        assert np.abs(everything[i, mask[i] == 1] - expected).max() < tolerance


def test_what_transformers_pads_on_the_left(tmp_path):
    """`generate` of stock transformers, several prompts at once, and the graph, greedily."""
    bundle = tiny_bundle("llama")
    exported(bundle, tmp_path)
    ids, mask = padded(rows_and_following()[0], max(LENGTHS), "left")
    with torch.no_grad():
        written = bundle.model.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask).long(),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
        )
    batch, text = Batch(tmp_path), ids
    while text.shape[1] < written.shape[1]:
        part = text if text is ids else text[:, -1:]
        chosen = batch.run(part, mask, keep=1)[:, -1].argmax(-1)[:, None]
        text = np.concatenate((text, chosen), axis=1)
        mask = np.concatenate((mask, np.ones((len(mask), 1))), axis=1)
    assert np.array_equal(text, written.numpy())


def test_zeros_between_tokens_close_up(tmp_path):
    exported(tiny_bundle("llama"), tmp_path)
    row = tokens(1, 4)
    gap = np.asarray([[row[0, 0], PAD, *row[0, 1:]]])
    found = Batch(tmp_path).run(gap, np.asarray([[1, 0, 1, 1, 1]]), keep=1)
    assert np.array_equal(found, Batch(tmp_path).run(row, np.ones((1, 4)), keep=1))


@pytest.mark.parametrize(
    ("what", "mask"),
    [
        ("a row of padding only", [[1, 1, 1], [0, 0, 0]]),
        ("a mask shorter than the ids", [[1, 1], [1, 1]]),
        ("a mask longer than the text", [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ("a mask of other numbers", [[2, 2, 2], [1, 1, 1]]),
    ],
)
def test_what_it_cannot_do_fails(what, mask, tmp_path):
    exported(tiny_bundle("llama"), tmp_path)
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        Batch(tmp_path).run(tokens(2, 3), np.asarray(mask), keep=1)


def test_several_later_tokens_of_several_rows_fail(tmp_path):
    exported(tiny_bundle("llama"), tmp_path)
    batch = Batch(tmp_path)
    batch.run(*padded([tokens(1, 3)[0]] * 2, 4, "left"), keep=1)
    with pytest.raises(Exception, match="batch_size must be 1"):
        batch.run(tokens(2, 2), np.ones((2, 6)), keep=1)


def test_codes_need_no_changes_of_shape(tmp_path):
    """Which pays for what padding costs: a decoded token goes through few nodes."""
    bundle = tiny_bundle("llama")
    exported(bundle, tmp_path / "float")
    exported(quantized(bundle, Int4(group=32)), tmp_path / "codes")

    def reshapes(kind):
        graph = onnx.load(tmp_path / kind / "model.onnx", load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)["Reshape"]

    assert reshapes("codes") == 1  # of the angles, folded as it loads
    assert reshapes("float") == 1 + 2 * 2 + 4  # into attention and out of it; ids, stream to and fro, logits
