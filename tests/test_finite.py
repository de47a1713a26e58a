"""NaN and infinity among weights are refused by the tensor's name, wherever weights come in or go out."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.artifact.bundle import CODES, Bundle
from compress.artifact.shards import Offload
from compress.errors import UserError
from compress.formats import QuantizedLinear
from compress.models.finite import numbers_of, require_finite
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.passes.quantize_hqq import QuantizeHQQ
from compress.passes.quantize_round import QuantizeRound

NAME = "model.layers.1.mlp.up_proj"
VALUES = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(params=VALUES, ids=str)
def value(request) -> float:
    return request.param


@pytest.fixture
def folder(bundle, value, tmp_path):
    """A checkpoint with one wrong value, as others would have written it."""
    bundle.model.get_submodule(NAME).weight.data[3, 5] = value
    bundle.model.save_pretrained(tmp_path / "m")
    bundle.tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def refused(match: str):
    return pytest.raises(UserError, match=match)


def test_at_the_door(folder):
    with refused(
        rf"model: '.*': 1 of the 2048 values of '{NAME}\.weight' are NaN or infinite; the checkpoint"
    ):
        Bundle.load(folder)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_in_half_precision(bundle, tmp_path, kind, value):
    bundle.model.get_submodule(NAME).weight.data[3, 5] = value
    bundle.model.to(getattr(torch, kind)).save_pretrained(tmp_path / "half")
    bundle.tokenizer.save_pretrained(tmp_path / "half")
    with refused(rf"'{NAME}\.weight' are NaN or infinite"):
        Bundle.load(tmp_path / "half")


def test_while_it_is_read_from_disk(folder, tmp_path):
    streamed = Bundle.load(folder, stream=True)
    assert streamed.shards is not None
    store = Offload(streamed.model, streamed.shards, tmp_path / "parts")
    store.load("model.layers.0")
    with refused(rf"model\.safetensors: 1 of the 2048 values of '{NAME}\.weight'"):
        store.load("model.layers.1")


def test_of_a_released_block(folder, bundle, tmp_path, value):
    bundle.model.get_submodule(NAME).weight.data[3, 5] = 0
    bundle.model.save_pretrained(folder)
    streamed = Bundle.load(folder, stream=True)
    store = Offload(streamed.model, streamed.shards, tmp_path / "parts")
    store.load("model.layers.1")
    streamed.model.get_submodule(NAME).weight.data[3, 5] = value
    with refused(rf"weights: 1 of the 2048 values of '{NAME}\.weight'.*milder settings"):
        store.release("model.layers.1")


@pytest.mark.parametrize(
    "step",
    [QuantizeRound(), QuantizeHQQ(), PruneMagnitude(sparsity=0.5), QuantizeGPTQ()],
    ids=lambda s: s.name(),
)
def test_in_a_model_that_was_handed_over(bundle, step, value, tmp_path):
    bundle.model.get_submodule(NAME).weight.data[3, 5] = value
    (tmp_path / "t.txt").write_text("def f(x): return x\n" * 4000)
    with refused(rf"model: 1 of the 2048 values of '{NAME}\.weight'"):
        bundle.apply(step, text=str(tmp_path / "t.txt"))


def test_that_a_pass_made(bundle, tmp_path, value):
    class Breaking(QuantizeRound):
        def __call__(self, bundle, context):
            result = bundle.clone()
            result.model.get_submodule(NAME).weight.data[0, 0] = value
            return result

    with refused(
        rf"test_finite: 1 of the 2048 values of '{NAME}\.weight' are NaN or infinite; what was done"
    ):
        bundle.apply(Breaking())


def test_that_would_be_saved(bundle, tmp_path, value):
    bundle.model.get_submodule(NAME).weight.data[:2, 5] = value
    with refused(rf"out: 2 of the 2048 values of '{NAME}\.weight' are NaN or infinite; what was"):
        bundle.save(tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_among_the_scales_of_codes(bundle, tmp_path, value):
    small = bundle.apply(QuantizeRound())
    small.save(tmp_path / "out")
    file = tmp_path / "out" / CODES
    state = load_file(file)
    state[f"{NAME}.quantized.scales"][0, 0] = value
    save_file(state, file, metadata={"format": "pt"})
    with refused(rf"1 of the \d+ values of '{NAME}\.quantized\.scales'"):
        Bundle.load(tmp_path / "out", verify=False)
    module = small.model.get_submodule(NAME)
    assert isinstance(module, QuantizedLinear)
    module.quantized.scales[0, 0] = value
    with refused(rf"quantize_round: 1 of the \d+ values of '{NAME}\.quantized\.scales'"):
        replace(small).save(tmp_path / "again")


def test_the_largest_numbers_are_numbers():
    largest = torch.full((70_000,), torch.finfo(torch.float32).max)
    require_finite(
        [("w", largest), ("-w", -largest), ("none", torch.zeros(0)), ("i", torch.zeros(2).int())], "x"
    )


def test_a_stored_mask_of_attention_may_hold_what_masks_hold():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    model.register_buffer("unstored", torch.tensor([torch.nan]), persistent=False)
    require_finite(numbers_of(model), "x")
    model.register_buffer("mean", torch.tensor([0.0, torch.nan]))
    with refused("'mean'"):
        require_finite(numbers_of(model), "x")
