"""What every tuner keeps to in every format: a new tuner or format is covered as soon as it is found."""

from typing import Any

import pytest
import torch
from training_set import equal, tiny_bundle, tiny_context, weights

from compress.artifact.bundle import Bundle
from compress.artifact.folder import CODES
from compress.formats import Grid, QuantizedTensor
from compress.formats.coded.trellis import halved
from compress.formats.registry import FORMATS as CLASSES
from compress.formats.registry import format_from
from compress.passes.base import Pass
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_round import QuantizeRound
from compress.passes.train import Train
from compress.run.registry import names, pass_class
from compress.training.codes.tuning import heldout_kl

# The fields a tuner needs to do much on a tiny model in a second.
FIELDS: dict[str, dict[str, Any]] = {
    "tune_blocks": {"steps": 12, "batch": 2, "heldout_windows": 2},
    "tune_scales": {"tokens": 12 * 4 * 32, "batch": 4, "window": 32, "checks": 3, "learning_rate": 3e-3},
}
TUNERS = [name for name in names() if pass_class(name).kind == "tune"]
KINDS = [member.model_fields["kind"].default for member in CLASSES]
# besides the defaults of every kind: coarse ones, in which there is something to win, and coded without turns
MORE = [
    {"kind": "int4", "group": None, "symmetric": True, "clip_search": 0},
    {"kind": "nf4", "group": None},
    {"kind": "coded", "rate": 3, "trellis": False},
]
FORMATS = [{"kind": kind} for kind in KINDS] + MORE


def build(name: str) -> Pass:
    return pass_class(name).model_validate(FIELDS.get(name, {}))


def called(description: dict[str, Any]) -> str:
    return " ".join(str(value) for value in description.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Bundle:
    bundle = tiny_bundle()
    folder = tmp_path_factory.mktemp("train")
    return Train(tokens=150 * 4 * 32, batch=4)(bundle, tiny_context(bundle, folder))


@pytest.fixture(scope="module")
def pruned(trained: Bundle, tmp_path_factory: Any) -> Bundle:
    return PruneMagnitude(sparsity=0.3)(trained, tiny_context(trained, tmp_path_factory.mktemp("prune")))


def held_codes(bundle: Bundle) -> dict[str, QuantizedTensor]:
    return {n: m.quantized for n, m in bundle.model.named_modules() if hasattr(m, "quantized")}


def kl(bundle: Bundle, base: Bundle, windows: Any) -> float:
    tokens = torch.from_numpy(windows.tokens).long()
    return heldout_kl(bundle.model, base.model, tokens, "float32")


def test_tuners_are_found():
    assert {"tune_blocks", "tune_scales"} <= set(TUNERS)


@pytest.mark.parametrize("description", FORMATS, ids=called)
@pytest.mark.parametrize("name", TUNERS)
class TestEveryTunerInEveryFormat:
    def test_it_loses_nothing_and_the_artifact_is_one_of_its_format(
        self, name, description, trained, tmp_path
    ):
        format = format_from(description)
        context = tiny_context(trained, tmp_path, teacher=trained)
        rounded = QuantizeRound(format=format, embeddings=None)(trained, context)
        before, bytes_before = weights(rounded), rounded.save(tmp_path / "before").files[CODES].bytes
        tuned = build(name)(rounded, context)
        assert equal(before, weights(rounded)), "a pass leaves its input as it was"

        # what it says it lowered did not rise, on any text that it did not learn from
        for windows in (context.data.heldout, context.data.evaluation):
            start, end = kl(rounded, trained, windows), kl(tuned, trained, windows)
            assert end <= 1.02 * start + 1e-4, (start, end)

        # every code is one of the format's, and a weight is what its code stands for
        for layer, tensor in held_codes(tuned).items():
            codes = tensor.unpacked()
            assert int(codes.max()) < format.levels, layer
            values = format.values(codes, Grid(tensor.scales.float(), tensor.grid.zeros))
            assert torch.equal(tensor.dequantize(), values), layer
            assert torch.equal(format.codes(values, tensor.grid), codes), layer
            assert torch.isfinite(tensor.scales).all(), layer
            assert (tensor.scales != 0).all(), layer
            assert torch.equal(tensor.grid.zeros, held_codes(rounded)[layer].grid.zeros), layer
            if format.run > 1:
                assert halved(codes.to(torch.int16) - 128) is not None, f"{layer} left the trellis"

        # no more bytes than the format promises, but for scales that were equal and are not
        manifest = tuned.save(tmp_path / "after")
        rows = sum(tensor.scales.numel() for tensor in held_codes(tuned).values())
        spare = 2 * rows if format.kind == "coded" else 0
        assert manifest.files[CODES].bytes <= bytes_before + spare

        loaded = Bundle.load(tmp_path / "after")
        assert equal(weights(loaded), weights(tuned))
        with torch.no_grad():
            ids = torch.from_numpy(context.data.heldout.tokens[:2]).long()
            assert torch.equal(loaded.model(ids).logits, tuned.model(ids).logits)

    def test_what_was_pruned_stays_zero_through_codes_and_disk(self, name, description, pruned, tmp_path):
        context = tiny_context(pruned, tmp_path, teacher=pruned)
        rounded = QuantizeRound(format=format_from(description), embeddings=None)(pruned, context)
        tuned = build(name)(rounded, context)
        tuned.save(tmp_path / "after")
        for result in (tuned, Bundle.load(tmp_path / "after")):
            assert result.masks.keys() == pruned.masks.keys()
            for layer, mask in pruned.masks.items():
                assert not result.model.get_submodule(layer).weight[~mask].any(), layer


@pytest.mark.parametrize("kind", ["nf4", "coded"])
def test_blocks_in_coarse_formats_gain(kind, trained, tmp_path):
    """Where rounding costs much, tuning by blocks wins much of it back; nf4's codes move, coded's stay."""
    format = format_from({"nf4": {"kind": "nf4", "group": None}, "coded": {"kind": "coded", "rate": 2}}[kind])
    context = tiny_context(trained, tmp_path, teacher=trained)
    rounded = QuantizeRound(format=format, embeddings=None)(trained, context)
    tuned = build("tune_blocks")(rounded, context)
    assert tuned.notes["heldout_error_fall"] > 0.1
    assert (tuned.notes["codes_moved"] > 0.01) == (kind == "nf4")
    assert (tuned.notes["codes_moved"] == 0) == (kind == "coded")
    assert kl(tuned, trained, context.data.evaluation) < kl(rounded, trained, context.data.evaluation)
