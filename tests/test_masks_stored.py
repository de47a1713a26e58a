"""A mask that went to disk is the mask that comes back, whatever the weights were rounded to."""

import pytest
import torch
import training_set
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.artifact.bundle import Bundle
from compress.artifact.folder import MANIFEST, disk_bytes
from compress.artifact.masks import MASKS, StoredMasks, kept_zeros, mask_of
from compress.errors import UserError
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.prune_wanda import PruneWanda
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.passes.quantize_hqq import QuantizeHQQ
from compress.passes.quantize_round import QuantizeRound
from compress.passes.store_sparse import StoreSparse
from compress.records.manifest import Manifest

NAME = "model.layers.1.mlp.up_proj"
FORMATS = [{"kind": kind} for kind in ("int2", "int3", "int4", "int8", "nf4")]


def share(bundle: Bundle) -> float:
    masks = bundle.masks.values()
    return sum(int((~m).sum()) for m in masks) / sum(m.numel() for m in masks)


def same(found: Bundle, right: Bundle) -> bool:
    assert found.masks.keys() == right.masks.keys()
    return all(torch.equal(found.masks[name], mask) for name, mask in right.masks.items())


@pytest.fixture
def pruned(bundle, make_context):
    return PruneMagnitude(sparsity=0.3)(bundle, make_context(bundle))


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f["kind"])
@pytest.mark.parametrize("step", [QuantizeGPTQ, QuantizeRound])
def test_a_share_stays_what_it_was(format, step, pruned, make_context, tmp_path):
    result = step(format=format, embeddings=None)(pruned, make_context(pruned))
    result.save(tmp_path / "a")
    loaded = Bundle.load(tmp_path / "a")
    assert share(loaded) == pytest.approx(0.3, abs=1e-3)
    assert same(loaded, pruned)
    loaded.save(tmp_path / "b")
    assert same(Bundle.load(tmp_path / "b"), pruned)
    weight = loaded.model.get_submodule(NAME).weight
    assert not weight[~loaded.masks[NAME]].any()


def test_there_are_zeros_to_tell_apart(pruned, make_context, tmp_path):
    result = QuantizeRound(format={"kind": "int2"}, embeddings=None)(pruned, make_context(pruned))
    zeros = result.model.get_submodule(NAME).weight == 0
    assert zeros.float().mean() > 0.35
    result.save(tmp_path / "a")
    bits = load_file(tmp_path / "a" / MASKS)
    assert bits[NAME].numel() == -(-int(zeros.sum()) // 8)
    manifest = Manifest.read(tmp_path / "a" / MANIFEST)
    assert manifest.files[MASKS].bytes == (tmp_path / "a" / MASKS).stat().st_size
    files = sum(record.bytes for record in manifest.files.values())
    assert disk_bytes(tmp_path / "a") == files + (tmp_path / "a" / MANIFEST).stat().st_size


@pytest.mark.parametrize("packed", [False, True])
def test_in_sparse_storage(packed, pruned, make_context, tmp_path):
    result = QuantizeHQQ(format={"kind": "int3", "group": 32})(pruned, make_context(pruned))
    StoreSparse(packed=packed)(result, make_context(result)).save(tmp_path / "a")
    assert same(Bundle.load(tmp_path / "a"), pruned)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_kept_float_that_is_zero(family, make_context, tmp_path):
    bundle = training_set.tiny_bundle(family=family)
    pruned = PruneMagnitude(sparsity=0.3)(bundle, make_context(bundle))
    name = next(iter(pruned.masks))
    weight, mask = pruned.model.get_submodule(name).weight, pruned.masks[name]
    row, column = (int(i) for i in mask.nonzero()[0])
    with torch.no_grad():
        weight[row, column] = 0
    pruned.save(tmp_path / "a")
    assert list(load_file(tmp_path / "a" / MASKS)) == [name]
    for stream in (False, True):
        assert same(Bundle.load(tmp_path / "a", stream=stream), pruned)
    streamed = Bundle.load(tmp_path / "a", stream=True)
    # by a pass that leaves them on disk, and writes them from there
    QuantizeRound(format="int8", embeddings=None)(streamed, make_context(bundle)).save(tmp_path / "b")
    assert same(Bundle.load(tmp_path / "b"), pruned)


def test_nothing_is_stored_where_zeros_tell_it(pruned, tmp_path):
    pruned.save(tmp_path / "a")
    assert not (tmp_path / "a" / MASKS).exists()
    assert same(Bundle.load(tmp_path / "a"), pruned)


@pytest.mark.parametrize("kind", ["int2", "int4"])
def test_blocks_that_are_on_disk(kind, pruned, make_context, tmp_path):
    pruned.save(tmp_path / "a")
    streamed = Bundle.load(tmp_path / "a", stream=True)
    assert isinstance(streamed.masks, StoredMasks)
    wanda = PruneWanda(sparsity=0.4)(streamed, make_context(pruned))
    wanda.save(tmp_path / "b")
    again = Bundle.load(tmp_path / "b", stream=True)
    assert share(again) == pytest.approx(0.4, abs=1e-3)
    result = QuantizeGPTQ(format={"kind": kind}, embeddings=None)(again, make_context(pruned, workdir="w"))
    assert result.parts
    result.save(tmp_path / "c")
    assert same(Bundle.load(tmp_path / "c"), Bundle.load(tmp_path / "b"))


@pytest.mark.parametrize("damage", ["short", "long", "floats"])
def test_a_file_that_does_not_fit_is_told(damage, pruned, make_context, tmp_path):
    result = QuantizeRound(format={"kind": "int2"}, embeddings=None)(pruned, make_context(pruned))
    result.save(tmp_path / "a")
    bits = load_file(tmp_path / "a" / MASKS)
    changes = {"short": bits[NAME][:-1], "long": bits[NAME].repeat(2), "floats": bits[NAME].float()}
    save_file({**bits, NAME: changes[damage]}, tmp_path / "a" / MASKS)
    manifest = Manifest.read(tmp_path / "a" / MANIFEST)
    size = (tmp_path / "a" / MASKS).stat().st_size
    record = manifest.files[MASKS].model_copy(update={"bytes": size})
    manifest.model_copy(update={"files": {**manifest.files, MASKS: record}}).write(tmp_path / "a" / MANIFEST)
    with pytest.raises(UserError, match=rf"{MASKS}: '{NAME}' does not fit its layer"):
        Bundle.load(tmp_path / "a", verify=False)
    assert Bundle.load(tmp_path / "a", masks=False, verify=False).masks == {}


def test_an_artifact_of_an_earlier_version_loads_as_it_did(pruned, make_context, tmp_path):
    result = QuantizeRound(format={"kind": "int2"}, embeddings=None)(pruned, make_context(pruned))
    result.save(tmp_path / "a")
    (tmp_path / "a" / MASKS).unlink()
    manifest = Manifest.read(tmp_path / "a" / MANIFEST)
    files = {name: record for name, record in manifest.files.items() if name != MASKS}
    manifest.model_copy(update={"files": files}).write(tmp_path / "a" / MANIFEST)
    loaded = Bundle.load(tmp_path / "a")
    assert torch.equal(loaded.masks[NAME], loaded.model.get_submodule(NAME).weight != 0)


def test_a_mask_over_weights_that_are_there_is_refused(bundle, tmp_path):
    mask = torch.ones(bundle.model.get_submodule(NAME).weight.shape, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(UserError, match=rf"masks: '{NAME}': a mask prunes weights that are not 0"):
        bundle.evolve(masks={NAME: mask}).save(tmp_path / "a")


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 19),
    zeros=st.floats(0, 1),
    kept=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_mask_over_zeros_comes_back(rows, columns, zeros, kept, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < zeros] = 0
    mask = (weight != 0) | (torch.rand(rows, columns, generator=generator) < kept)
    bits = kept_zeros(mask, weight)
    assert torch.equal(mask_of(weight, bits), mask)
    assert (bits is None) == torch.equal(mask, weight != 0)
