"""Masks over matrices that nobody would choose: counts are exact, what goes to disk comes back."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from compress.artifact.masks import MASKS, loaded_masks, read_bits, stored_masks, write_bits
from compress.artifact.shards import ShardReader
from compress.artifact.sparse import compact, expand, widen
from compress.errors import UserError
from compress.formats import Nf4, QuantizedLinear, QuantizedTensor
from compress.formats.registry import FORMATS
from compress.layerwise.sparsity import SparsityGoal, targets
from compress.records.manifest import LayerRecord
from compress.solvers import gradual, masks
from compress.solvers.wanda import wanda

few = settings(max_examples=40)
SIDES = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 31])
SCORES = [0.0, -0.0, 1e-45, 1e-38, 0.5, 1.0, 1.0, 65504.0, 3e38, float("inf")]
KINDS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def filled(draw: st.DrawFn, rows: int, columns: int, values: list[float]) -> torch.Tensor:
    """Few distinct values, one alone, or all different."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        kept = draw(st.lists(st.sampled_from(values), min_size=1, max_size=4))
        return torch.tensor(kept)[torch.randint(len(kept), (rows, columns), generator=generator)]
    return torch.randn(rows, columns, generator=generator)


@st.composite
def scores(draw: st.DrawFn, columns: st.SearchStrategy[int] = SIDES) -> torch.Tensor:
    return filled(draw, draw(SIDES), draw(columns), SCORES).abs().to(draw(KINDS))


@st.composite
def carried(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor | None:
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]))
    if share is None:
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.rand(shape, generator=generator) >= share


def right(scores: torch.Tensor, count: int, before: torch.Tensor | None) -> np.ndarray:
    """What is gone goes first, then the smallest, of equal ones the first: by numpy's stable sort."""
    values, gone = scores.double().numpy().ravel(), np.zeros(scores.numel(), bool)
    if before is not None:
        gone = ~before.numpy().ravel()
    order = np.lexsort((np.arange(values.size), np.abs(values), ~gone))
    mask = np.ones(values.size, bool)
    mask[order[:count]] = False
    return mask.reshape(scores.shape)


@few
@given(scores(), st.data())
def test_a_matrix_loses_exactly_so_many_the_smallest_first(scores, data):
    before = data.draw(carried(tuple(scores.shape)))
    gone = 0 if before is None else int((~before).sum())
    count = data.draw(st.integers(0, scores.numel()))
    found = masks.best(scores, count, before)
    assert int((~found).sum()) == max(count, gone)
    assert np.array_equal(found.numpy(), right(scores, max(count, gone), before))


@few
@given(scores(), st.data())
def test_rows_are_as_equally_sparse_as_they_can_be(scores, data):
    before = data.draw(carried(tuple(scores.shape)))
    least = np.zeros(len(scores), int) if before is None else (~before.numpy()).sum(1)
    count = data.draw(st.integers(0, scores.numel()))
    found = masks.best_per_row(scores, count, before).numpy()
    zeros = (~found).sum(1)
    assert zeros.sum() == max(count, least.sum())
    free = zeros > least  # of those that could have lost less, none has lost two more than another
    assert not free.any() or zeros[free].max() <= zeros.min() + 1
    for row, mask in enumerate(found):
        one = None if before is None else before[row : row + 1]
        assert np.array_equal(mask[None], right(scores[row : row + 1], int(zeros[row]), one))


@few
@given(st.integers(1, 33), st.data())
def test_a_pattern_keeps_so_many_of_every_group_and_never_more(of, data):
    stay = data.draw(st.integers(0, of))
    matrix = data.draw(scores(st.integers(1, 4).map(lambda n: n * of)))
    before = data.draw(carried(tuple(matrix.shape)))
    found = masks.best(matrix, (stay, of), before).numpy().reshape(-1, of)
    if before is None:
        assert (found.sum(1) == stay).all()
    else:
        kept = before.numpy().reshape(-1, of)
        assert np.array_equal(found.sum(1), np.minimum(kept.sum(1), stay))
        assert not (found & ~kept).any()
    assert torch.equal(masks.best(matrix, (stay, of), before), masks.best_per_row(matrix, (stay, of), before))


@pytest.mark.parametrize("function", [masks.best, masks.best_per_row])
@pytest.mark.parametrize("target", [2, (2, 4)])
def test_scores_that_are_no_numbers_are_refused(function, target):
    scores = torch.tensor([[1.0, float("nan"), 2.0, 0.0]])
    with pytest.raises(UserError, match="scores that are not numbers"):
        function(scores, target)


def test_an_activation_beyond_float32_is_refused_by_wanda():
    with pytest.raises(UserError, match="scores that are not numbers"):
        wanda(torch.tensor([[0.0, 1.0]]), torch.tensor([float("inf"), 1.0]), 1)


@few
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5), st.floats(0.001, 0.999), st.data())
def test_a_model_gets_the_share_that_was_asked_for_to_one_weight(shapes, share, data):
    model = nn.ModuleDict({f"l{i}": nn.Linear(c, r, bias=False) for i, (r, c) in enumerate(shapes)})
    names, before = list(model), {}
    for name in names:
        mask = data.draw(carried(tuple(model[name].weight.shape)))
        if mask is not None:
            before[name] = mask
    found = targets(SparsityGoal(sparsity=share), model, names, before, torch.zeros(0))
    sizes = [model[name].weight.numel() for name in names]
    least = [int((~before[name]).sum()) if name in before else 0 for name in names]
    assert sum(found.values()) == max(round(share * sum(sizes)), sum(least))
    assert all(low <= found[n] <= size for n, low, size in zip(names, least, sizes, strict=True))
    if not before:
        assert all(abs(found[n] - share * size) <= 1 for n, size in zip(names, sizes, strict=True))


@few
@given(st.data(), st.integers(1, 3))
def test_while_sparsity_grows_masks_only_shrink_and_meet_their_share(data, count):
    matrices = {f"m{i}": data.draw(scores()) for i in range(count)}
    kept = {name: torch.ones_like(m, dtype=torch.bool) for name, m in matrices.items()}
    shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=3)))
    step = data.draw(st.sampled_from([gradual.shrink_each, gradual.shrink_all]))
    for share in shares:
        found = step(matrices, kept, share)
        zeros = {name: int((~mask).sum()) for name, mask in found.items()}
        if step is gradual.shrink_each:
            assert zeros == {name: round(share * mask.numel()) for name, mask in found.items()}
        else:
            assert sum(zeros.values()) == round(share * sum(m.numel() for m in matrices.values()))
        assert not any((found[name] & ~kept[name]).any() for name in kept)
        kept = found


@st.composite
def pruned_layers(draw: st.DrawFn) -> tuple[nn.ModuleDict, dict[str, torch.Tensor]]:
    """Layers with holes, and masks that keep some of their zeros; some hold codes, some share a format."""
    layers, kept = {}, {}
    for number in range(draw(st.integers(1, 4))):
        rows, columns = draw(SIDES), draw(SIDES)
        weight = filled(draw, rows, columns, [0.0, -0.0, 1e-45, -1e-40, 1.5, -6e4])
        layer: nn.Module = nn.Linear(columns, rows, bias=False, dtype=draw(KINDS))
        if draw(st.booleans()):
            format = draw(st.sampled_from(FORMATS))
            holes = {} if format is Nf4 else {"symmetric": True}
            layer = QuantizedLinear(QuantizedTensor.round(format(**holes).keeping_zeros(), weight))
        else:
            layer.weight.data.copy_(weight)
        name = f"l{number}"
        layers[name] = layer
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        share = draw(st.sampled_from([0.0, 0.5, 1.0]))
        kept[name] = (layer.weight != 0) | (torch.rand(rows, columns, generator=generator) < share)
    return nn.ModuleDict(layers), kept


@few
@given(pruned_layers())
def test_masks_come_back_from_disk(made):
    model, kept = made
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bits(kept, model, [], {}, folder)
        bits = read_bits(folder)
        zeros = {name: int((layer.weight == 0).sum()) for name, layer in model.items()}
        some = {name for name in kept if (kept[name] & (model[name].weight == 0)).any()}
        assert bits.keys() == some
        assert (folder / MASKS).exists() == bool(some)
        assert all(bits[name].numel() == -(-zeros[name] // 8) for name in some)
        found = loaded_masks(model, kept, bits)
        assert all(torch.equal(found[name], mask) for name, mask in kept.items())
        # those of floats that stay on disk
        floats = {name: layer for name, layer in model.items() if isinstance(layer, nn.Linear)}
        if floats:
            state = {f"{name}.weight": layer.weight.data.contiguous() for name, layer in floats.items()}
            save_file(state, folder / "w.safetensors")
            lazily = stored_masks(model, ShardReader([folder / "w.safetensors"]), floats, bits)
            assert all(torch.equal(lazily[name], kept[name]) for name in floats)


@few
@given(pruned_layers())
def test_sparse_storage_gives_back_the_state_and_is_never_larger(made):
    model, _ = made
    state = {name: t.detach() for name, t in model.state_dict().items()}
    layers = {
        name: LayerRecord(format=layer.quantized.format.model_dump(), shape=layer.quantized.shape)
        for name, layer in model.items()
        if isinstance(layer, QuantizedLinear)
    }
    packed, records = compact(state, model)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "s.safetensors"
        save_file(packed, file)
        found = load_file(file)
    assert sum(t.numel() * t.element_size() for t in found.values()) <= sum(
        t.numel() * t.element_size() for t in state.values()
    )
    expand(found, records, layers, Path("file"))
    widen(found, model)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
