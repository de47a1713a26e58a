"""Prompts of different lengths in one batch, padded on the right, give what each alone gives."""

import numpy as np
import onnxruntime
import pytest
from export_models import exported, tiny_bundle, tokens

LENGTHS = (3, 12, 7)
PAD = 1


class Batch:
    """A padded batch through the graph itself, with a mask and growing arrays as cache."""

    def __init__(self, folder):
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = [x for x in self.session.get_inputs() if x.name.startswith("past_key_values")]
        self.names = ["logits", *(x.name.replace("past_key_values", "present") for x in self.inputs)]
        self.past = {}

    def run(self, ids, mask, keep):
        past = self.past or {
            x.name: np.zeros((len(ids), x.shape[1], 0, x.shape[3]), dtype=np.float32) for x in self.inputs
        }
        feed = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64), **past}
        logits, *present = self.session.run(self.names, {**feed, "logits_to_keep": np.asarray([keep])})
        self.past = {x.name: value for x, value in zip(self.inputs, present, strict=True)}
        return logits


def padded(rows, longest):
    ids = np.full((len(rows), longest), PAD)
    mask = np.zeros((len(rows), longest))
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


@pytest.mark.parametrize("mask_grows", ["behind the text", "behind the padding"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window", "gemma2", "phi", "gpt_neox"])
def test_each_row_is_what_it_is_alone(name, mask_grows, tmp_path):
    runtime = exported(tiny_bundle(name), tmp_path)
    rows = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    following = tokens(len(rows), 5, seed=99)
    batch = Batch(tmp_path)
    ids, mask = padded(rows, max(LENGTHS))
    found = [batch.run(ids, mask, keep=1)[:, -1]]
    for step in range(5):
        if mask_grows == "behind the text":
            _, mask = padded([np.ones(length + step + 1) for length in LENGTHS], max(LENGTHS) + step + 1)
        else:
            mask = np.concatenate((mask, np.ones((len(rows), 1))), axis=1)
        found.append(batch.run(following[:, step : step + 1], mask, keep=1)[:, -1])
    for i, row in enumerate(rows):
        text = np.concatenate((row, following[i]))[None]
        expected = runtime.logits(text)[0, len(row) - 1 :]
        got = np.stack([step[i] for step in found])
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_more_positions_than_the_last(tmp_path):
    runtime = exported(tiny_bundle("llama"), tmp_path)
    rows = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    ids, mask = padded(rows, max(LENGTHS))
    alone = [runtime.logits(row[None])[0] for row in rows]
    four = Batch(tmp_path).run(ids, mask, keep=4)
    everything = Batch(tmp_path).run(ids, mask, keep=0)
    for i, expected in enumerate(alone):
        tolerance = 1e-5 * np.abs(expected).max()
        kept = expected[-4:]
        assert np.abs(four[i, : len(kept)] - kept).max() < tolerance
        assert np.abs(everything[i, : len(expected)] - expected).max() < tolerance
