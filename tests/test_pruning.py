"""Unstructured pruning of whole models: counts, allocation, targets, and masks that travel."""

from pathlib import Path
from typing import Any

import pytest
import torch
import training_set
from cli_helpers import invoke, refused, write_recipe, write_text
from pydantic import ValidationError

from compress.artifact.bundle import Bundle
from compress.artifact.counts import parameter_counts
from compress.artifact.shards import join
from compress.artifact.sparse import SPARSE
from compress.calibration.magnitudes import input_statistics
from compress.errors import UserError
from compress.formats import QuantizedLinear
from compress.layerwise.sparsity import SparsityGoal, targets
from compress.models.layers import linear_layers, matrix
from compress.passes.base import Pass
from compress.passes.prune_alps import PruneAlps
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.prune_sparsegpt import PruneSparsegpt
from compress.passes.prune_wanda import PruneWanda
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.run.pipeline import make
from compress.run.recipe import load_recipe
from compress.solvers import outliers
from compress.solvers.masks import smallest_per_row

PASSES = [PruneMagnitude, PruneWanda, PruneSparsegpt, PruneAlps]
MEASURED = {"measured_windows": 2, "measured_tokens": 16, "measured_shares": 3}


def zeros(bundle: Bundle) -> dict[str, int]:
    names = linear_layers(bundle.model)
    return {name: int((matrix(bundle.model.get_submodule(name)) == 0).sum()) for name in names}


def windows_of(context: Any) -> torch.Tensor:
    return torch.from_numpy(context.data.calibration.tokens).long()


@torch.no_grad()
def last_hidden(bundle: Bundle, windows: torch.Tensor) -> torch.Tensor:
    return bundle.model(input_ids=windows, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("allocation", ["uniform", "owl", "kl"])
def test_the_zeros_of_all_layers_together_are_exactly_those_asked_for(step, allocation, bundle, make_context):
    context = make_context(bundle)
    result = step(sparsity=0.37, allocation=allocation, **MEASURED)(bundle, context)
    sizes = {n: matrix(bundle.model.get_submodule(n)).numel() for n in linear_layers(bundle.model)}
    found = zeros(result)
    assert sum(found.values()) == round(0.37 * sum(sizes.values())) == result.notes["removed"]
    shares = {name: found[name] / sizes[name] for name in sizes}
    even = max(abs(share - 0.37) for share in shares.values())
    assert even < 1e-3 if allocation == "uniform" else even > 0.01
    for name, mask in result.masks.items():
        assert int((~mask).sum()) == found[name]


@pytest.mark.parametrize("step", PASSES)
def test_what_an_earlier_pruning_removed_counts_and_stays(step, bundle, make_context):
    context = make_context(bundle)
    first = PruneMagnitude(sparsity=0.3, scope="model")(bundle, context)
    second = step(sparsity=0.5)(first, context)
    total = sum(mask.numel() for mask in second.masks.values())
    assert second.notes["removed"] == round(0.5 * total)
    assert all(not second.masks[name][~mask].any() for name, mask in first.masks.items())
    third = step(sparsity=0.1)(first, context)
    assert third.notes["removed"] == first.notes["removed"]


@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("pattern", ["1:4", "3:8"])
def test_a_pattern_holds_in_gpt2_too_and_biases_stay(step, pattern, make_context):
    bundle = training_set.tiny_bundle(family="gpt2")
    with torch.no_grad():
        for name in linear_layers(bundle.model):
            bundle.model.get_submodule(name).bias.normal_()
    result = step(pattern=pattern)(bundle, make_context(bundle))
    kept, of = map(int, pattern.split(":"))
    for name, mask in result.masks.items():
        old, new = bundle.model.get_submodule(name), result.model.get_submodule(name)
        assert mask.shape == matrix(new).shape
        assert torch.equal(matrix(new) != 0, mask)
        assert (mask.reshape(-1, of).sum(1) == kept).all()
        assert torch.equal(old.bias, new.bias)
        if step in (PruneMagnitude, PruneWanda):
            assert torch.equal(matrix(new), matrix(old) * mask)
        else:
            assert not torch.equal(matrix(new), matrix(old) * mask)


def test_later_layers_are_scored_by_what_the_pruned_ones_give(bundle, make_context):
    context = make_context(bundle)
    result = PruneWanda(sparsity=0.5)(bundle, context)
    last = "model.layers.3.self_attn.q_proj"
    squares = input_statistics(result.model, windows_of(context), [last], samples=0)[last].squares
    weight = matrix(bundle.model.get_submodule(last))
    expected = smallest_per_row(weight.abs() * squares.sqrt(), weight.shape[1] // 2)
    assert (result.masks[last] != expected).float().mean() < 0.002  # sums in another order may tip a tie
    dense = input_statistics(bundle.model, windows_of(context), [last], samples=0)[last].squares
    other = smallest_per_row(weight.abs() * dense.sqrt(), weight.shape[1] // 2)
    assert (result.masks[last] != other).float().mean() > 0.01


def test_methods_come_in_the_order_of_their_papers_and_the_target_helps(bundle, make_context):
    context = make_context(bundle)
    with torch.no_grad():  # inputs of unequal size, as trained models have them
        for name, parameter in bundle.model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(torch.logspace(-1, 1, parameter.numel()))
    wanted = last_hidden(bundle, windows_of(context))
    steps = [
        PruneMagnitude(sparsity=0.6),
        PruneWanda(sparsity=0.6),
        PruneSparsegpt(sparsity=0.6, asymmetric=0),
        PruneAlps(sparsity=0.6, asymmetric=0),
        PruneAlps(sparsity=0.6, asymmetric=1),
    ]
    pruned = [last_hidden(step(bundle, context), windows_of(context)) for step in steps]
    lost = [float((found - wanted).square().mean()) for found in pruned]
    assert lost == sorted(lost, reverse=True), lost


def test_blocks_with_more_outliers_stay_denser(bundle, make_context):
    context = make_context(bundle)
    with torch.no_grad():
        for name in linear_layers(bundle.model, ("model.layers.2.*",)):
            bundle.model.get_submodule(name).weight[:, ::16] *= 30
    result = PruneWanda(sparsity=0.7, allocation="owl")(bundle, context)
    shares = {n: float((~m).float().mean()) for n, m in result.masks.items()}
    block = {number: shares[f"model.layers.{number}.mlp.up_proj"] for number in range(4)}
    assert min(block, key=block.__getitem__) == 2
    assert 0.1 < max(block.values()) - min(block.values()) <= 0.16 + 1e-3
    # all layers of a block are alike
    assert shares["model.layers.2.self_attn.q_proj"] == pytest.approx(block[2], abs=2e-3)


def test_outlier_shares_keep_their_mean_over_blocks_of_unequal_size():
    sizes = [100, 300, 50]
    found = outliers.shares([0.01, 0.02, 0.05], sizes, 0.6)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(0.6)
    assert max(found) - min(found) == pytest.approx(0.16)
    assert outliers.shares([0.3, 0.3], [1, 2], 0.6) == [0.6, 0.6]


def test_measured_kl_takes_zeros_from_where_they_cost_nothing(bundle, make_context):
    context = make_context(bundle)
    with torch.no_grad():  # block 1 adds nothing to the stream
        for leaf in ("self_attn.o_proj", "mlp.down_proj"):
            bundle.model.get_submodule(f"model.layers.1.{leaf}").weight.mul_(1e-6)
    goal = SparsityGoal(sparsity=0.5, allocation="kl", spread=0.3, **MEASURED)
    before = training_set.weights(bundle)
    names = linear_layers(bundle.model)
    found = targets(goal, bundle.model, names, {}, windows_of(context))
    assert training_set.equal(before, training_set.weights(bundle))  # it only measures
    sizes = {n: matrix(bundle.model.get_submodule(n)).numel() for n in names}
    assert sum(found.values()) == round(0.5 * sum(sizes.values()))
    shares = [found[name] / sizes[name] for name in (f"model.layers.{i}.mlp.up_proj" for i in range(4))]
    assert shares[1] == max(shares) > 0.7
    assert max(shares[0], shares[2], shares[3]) < 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "4:2"}, "'4:2' removes nothing; N must be less than M"),
        (
            {"pattern": "2:4", "allocation": "owl"},
            "'owl' has nothing to share out where every group keeps 2:4",
        ),
        ({"sparsity": 1.0}, "less than 1"),
        ({"allocation": "even"}, "'uniform', 'owl' or 'kl'"),
    ],
)
def test_fields_that_cannot_be_met_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        PruneAlps(**fields)


@pytest.mark.parametrize("other", [{"allocation": "kl"}, {"pattern": "2:4"}])
def test_one_threshold_for_all_layers_leaves_nothing_else_to_decide(other):
    with pytest.raises(ValidationError, match="scope: model has one threshold for all; give one of the two"):
        PruneMagnitude(scope="model", **other)


@pytest.mark.parametrize("step", PASSES)
def test_a_pattern_that_does_not_divide_a_layer_names_it(step, bundle, make_context):
    with pytest.raises(UserError, match=r"'2:7' does not fit 'model\.layers\.0\..*' with 32 columns; .*skip"):
        step(pattern="2:7")(bundle, make_context(bundle))


def test_the_command_line_tells_it_before_any_work(tmp_path):
    variants = {"v": [{"prune_alps": {"pattern": "2:7"}}]}
    recipe = write_recipe(tmp_path / "r.yaml", write_text(tmp_path / "text", documents=30), variants=variants)
    line = refused("run", recipe, "--output", tmp_path / "run")
    assert "'2:7' does not fit 'model.layers.0.self_attn.q_proj' with 64 columns" in line
    assert not (tmp_path / "run" / ".steps").exists()
    line = refused("run", recipe, "--set", "variants.v.passes=[{prune_alps: {allocation: even}}]")
    assert "allocation: 'even' is not valid" in line


def whole_and_streamed(step: Pass, source: Path, make_context: Any, folder: Path) -> list[Bundle]:
    """Artifacts of the same step on a model in memory and on one that stays on disk."""
    found = []
    for stream in (False, True):
        bundle = Bundle.load(source, stream=stream)
        assert all(p.is_meta for p in bundle.model.parameters()) == stream
        place = folder / ("streamed" if stream else "whole")
        place.parent.mkdir(exist_ok=True)
        step(bundle, make_context(Bundle.load(source), workdir=f"work-{folder.name}-{stream}")).save(place)
        found.append(Bundle.load(place))
    return found


def same(whole: Bundle, streamed: Bundle) -> None:
    assert training_set.equal(training_set.weights(whole), training_set.weights(streamed))
    assert whole.masks.keys() == streamed.masks.keys()
    assert all(torch.equal(mask, streamed.masks[name]) for name, mask in whole.masks.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_stays_on_disk_is_pruned_and_quantized_alike(
    family, make_context, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM

    dense = training_set.tiny_bundle(family=family)
    first = PruneMagnitude(sparsity=0.2, select=("*.0.*",))(dense, make_context(dense))
    first.save(tmp_path / "source")
    monkeypatch.setattr(
        "compress.artifact.bundle.join", lambda parts, folder, stem: join(parts, folder, stem, 40_000)
    )
    pruned = whole_and_streamed(
        PruneSparsegpt(sparsity=0.5), tmp_path / "source", make_context, tmp_path / "pruned"
    )
    same(*pruned)
    assert all(not pruned[1].masks[name][~mask].any() for name, mask in first.masks.items())
    written = tmp_path / "pruned" / "streamed"
    assert len(list(written.glob("model-*.safetensors"))) > 1
    stock = AutoModelForCausalLM.from_pretrained(written).state_dict()
    assert training_set.equal(stock, training_set.weights(pruned[0]))
    same(*whole_and_streamed(QuantizeGPTQ(asymmetric=0), written, make_context, tmp_path / "coded"))


def test_a_model_on_disk_goes_from_pass_to_pass_without_being_saved(bundle, make_context, tmp_path):
    bundle.save(tmp_path / "source")
    for name, stream in (("whole", False), ("streamed", True)):
        current = Bundle.load(tmp_path / "source", stream=stream)
        for step in (PruneWanda(pattern="2:4"), QuantizeGPTQ(asymmetric=0)):
            current = step(current, make_context(bundle, workdir=f"{name}-{step.name()}"))
        current.save(tmp_path / name)
    same(*(Bundle.load(tmp_path / name) for name in ("whole", "streamed")))


@pytest.mark.parametrize(
    "step", [PruneWanda(allocation="owl"), PruneAlps(pattern="2:4", asymmetric="heldout", batch=1)]
)
def test_whatever_the_settings_a_model_on_disk_is_pruned_alike(step, bundle, make_context, tmp_path):
    bundle.save(tmp_path / "source")
    same(*whole_and_streamed(step, tmp_path / "source", make_context, tmp_path / "pruned"))


CHAIN: list[Any] = [
    {"prune_alps": {"pattern": "2:4", "allocation": "uniform"}},
    {"distill": {"tokens": 256, "batch": 4}},
    {"quantize_gptq": {"format": "int4"}},
    "store_sparse",
]


def test_masks_travel_through_the_command_line(tmp_path: Path):
    text = write_text(tmp_path / "text", documents=30)
    recipe = write_recipe(tmp_path / "recipe.yaml", text, variants={"sparse": CHAIN})
    outcome = invoke("run", recipe, "--output", tmp_path / "run", "--no-measure")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "run" / "sparse"
    assert (folder / SPARSE).is_file()
    model = Bundle.load(folder).model
    layers = [m for n, m in model.named_modules() if isinstance(m, QuantizedLinear) and ".layers." in n]
    assert len(layers) == 2 * 7
    assert all(int((m.weight.reshape(-1, 4) != 0).sum(1).max()) <= 2 for m in layers)
    whole, nonzero = parameter_counts(model)
    dead = sum(int((m.weight == 0).sum()) for m in layers)
    assert whole - nonzero >= dead >= sum(m.weight.numel() for m in layers) // 2


def test_a_pruned_artifact_is_a_checkpoint_whose_masks_hold(bundle, make_context, tmp_path):
    PruneMagnitude(pattern="2:4")(bundle, make_context(bundle)).save(tmp_path / "pruned")
    text = write_text(tmp_path / "text", documents=30)
    source = {"checkpoint": str(tmp_path / "pruned")}
    variants = {"coded": ["quantize_gptq"]}
    recipe = load_recipe(str(write_recipe(tmp_path / "r.yaml", text, model=source, variants=variants)))
    (tmp_path / "run").mkdir()
    make(recipe, tmp_path / "run")
    loaded = Bundle.load(tmp_path / "run" / "coded")
    for name in linear_layers(bundle.model):
        weight = loaded.model.get_submodule(name).weight
        assert int((weight.reshape(-1, 4) != 0).sum(1).max()) <= 2


def test_every_pass_says_what_it_needs():
    for step in PASSES:
        assert issubclass(step, Pass)
        assert step.needs == {"calibration"}
