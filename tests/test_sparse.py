"""Zeros that are not stored: smaller files, the same weights, dense or packed in memory; damage is told."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training_set
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.artifact.bundle import Bundle
from compress.artifact.counts import parameter_counts, weight_bytes, weight_file_bytes
from compress.artifact.folder import disk_bytes
from compress.artifact.sparse import SPARSE
from compress.errors import UserError
from compress.formats import Int2, Int3, Int4, Int8, Nf4, QuantizedTensor
from compress.formats.sparse import pack_codes, pack_floats, unpack_codes, unpack_floats
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_round import QuantizeRound
from compress.passes.store_sparse import StoreSparse
from compress.passes.train import Train
from compress.records.manifest import Manifest
from compress.runtimes.torch_runtime import TorchRuntime

FORMATS = [Int2(group=16), Int3(group=None), Int4(group=16, symmetric=False), Int8(), Nf4(group=16)]
kinds = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def sparse_weight(rows: int, columns: int, share: float, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    return weight * (torch.rand(rows, columns, generator=random) >= share)


@given(
    st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.0, 0.3, 0.9, 1.0]), kinds, st.integers(0, 99)
)
def test_floats_come_back_bit_for_bit(rows, columns, share, kind, seed):
    weight = sparse_weight(rows, columns, share, seed).to(kind)
    bitmask, values = pack_floats(weight)
    assert values.dtype == kind
    assert len(values) == int(weight.count_nonzero())
    assert bitmask.numel() == -(-weight.numel() // 8)
    assert torch.equal(unpack_floats(bitmask, values, (rows, columns)), weight)


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(FORMATS),
    st.integers(0, 99),
)
def test_codes_come_back_bit_for_bit(rows, columns, share, format, seed):
    held = QuantizedTensor.round(format, sparse_weight(rows, columns, share, seed) + 0.0)
    bitmask, values = pack_codes(held)
    found = unpack_codes(bitmask, values, held.grid.zeros, format, held.shape)
    assert torch.equal(found, held.codes)


@pytest.mark.parametrize(
    ("bitmask", "values", "message"),
    [
        ([7], [1.0, 2.0], "2 values where the bitmask has 3"),
        ([7, 0], [1.0, 2.0, 3.0], "a bitmask of 2 bytes for 6 weights"),
        ([67], [1.0, 2.0, 3.0], "sets more than the 6 weights"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(bitmask, values, message):
    with pytest.raises(UserError, match=message):
        unpack_floats(torch.tensor(bitmask, dtype=torch.uint8), torch.tensor(values), (2, 3))


CHAINS = {
    "float": [PruneMagnitude(sparsity=0.6)],
    "pattern-int4": [PruneMagnitude(pattern="2:4"), QuantizeRound(format=Int4(group=16))],
    "int8": [PruneMagnitude(sparsity=0.5), QuantizeRound()],
    "healed": [PruneMagnitude(sparsity=0.5), Train(tokens=128, batch=4)],  # its zeros come with signs
}


@pytest.fixture(params=CHAINS)
def pruned(request: Any, bundle: Bundle, make_context: Any) -> Bundle:
    for step in CHAINS[request.param]:
        bundle = step(bundle, make_context(bundle, workdir=step.name()))
    return bundle


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_file_is_smaller_and_gives_back_the_same_model(family, packed, make_context, tmp_path):
    bundle = training_set.tiny_bundle(family=family)
    pruned = PruneMagnitude(sparsity=0.75)(bundle, make_context(bundle))
    pruned.save(tmp_path / "dense")
    result = StoreSparse(packed=packed)(pruned, make_context(bundle))
    manifest = result.save(tmp_path / "sparse")
    sizes = {name: weight_file_bytes(tmp_path / name) for name in ("dense", "sparse")}
    assert sizes["sparse"] == pytest.approx(result.notes["sparse_bytes"], abs=12_000)  # the header
    assert result.notes["dense_bytes"] == weight_bytes(bundle.model)
    linear = sum(m.numel() for m in pruned.masks.values())
    saved = 4 * linear - linear // 4 * 4 - linear // 8
    # gains of norms, and of biases that are zero, are written in 16 bits
    narrow = 2 * sum(p.numel() for p in bundle.model.parameters() if p.dim() == 1)
    found = result.notes["dense_bytes"] - result.notes["sparse_bytes"]
    assert found == pytest.approx(saved + narrow, abs=64)
    assert disk_bytes(tmp_path / "sparse") < disk_bytes(tmp_path / "dense")
    assert len(manifest.sparse) == result.notes["matrices"] == len(pruned.masks)

    dense = Bundle.load(tmp_path / "sparse")
    assert training_set.equal(training_set.weights(dense), training_set.weights(result))
    assert all(torch.equal(dense.masks[name], mask) for name, mask in pruned.masks.items())
    assert dense.model.get_input_embeddings().weight is dense.model.get_output_embeddings().weight
    held = Bundle.load(tmp_path / "sparse", packed=True).model
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(held(input_ids=ids).logits, dense.model(input_ids=ids).logits)
    assert parameter_counts(held) == parameter_counts(dense.model)
    assert weight_bytes(held) == result.notes["sparse_bytes"] + narrow  # which is wide in memory
    # what measuring loads is what the pass was told
    runtime = TorchRuntime(tmp_path / "sparse", threads=torch.get_num_threads())
    assert runtime.weight_bytes == weight_bytes(held if packed else dense.model)
    assert runtime.parameter_counts() == parameter_counts(dense.model)
    with pytest.raises(UserError, match="can only run; load it dense"):
        Bundle.load(tmp_path / "sparse", packed=True).save(tmp_path / "again")


def test_floats_and_codes_of_every_chain_come_back(pruned, make_context, tmp_path):
    pruned.save(tmp_path / "dense")
    result = StoreSparse()(pruned, make_context(pruned))
    result.save(tmp_path / "sparse")
    assert weight_file_bytes(tmp_path / "sparse") < weight_file_bytes(tmp_path / "dense")
    loaded = Bundle.load(tmp_path / "sparse")
    assert training_set.equal(training_set.weights(loaded), training_set.weights(pruned))
    digests = [
        hashlib.sha256(b"".join(t.numpy().tobytes() for t in training_set.weights(b).values())).digest()
        for b in (loaded, result)
    ]
    assert digests[0] == digests[1]  # signs of zeros, too
    with torch.no_grad():
        ids = torch.arange(24)[None]
        held = Bundle.load(tmp_path / "sparse", packed=True).model
        assert torch.equal(held(input_ids=ids).logits, loaded.model(input_ids=ids).logits)
    assert parameter_counts(held) == parameter_counts(loaded.model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_half_of_it_and_exact(dtype, bundle, make_context, tmp_path):
    pruned = PruneMagnitude()(bundle, make_context(bundle))
    result = StoreSparse(dtype=dtype)(pruned, make_context(bundle))
    result.save(tmp_path / "half")
    loaded = Bundle.load(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert training_set.equal(training_set.weights(loaded), training_set.weights(result))
    for name, tensor in training_set.weights(pruned).items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.to(getattr(torch, dtype)).float())
    linear = sum(mask.numel() for mask in pruned.masks.values())
    rest = sum(p.numel() for p in bundle.model.parameters()) - linear
    assert result.notes["sparse_bytes"] == pytest.approx(linear + linear // 8 + 2 * rest, abs=64)


def test_weights_that_came_in_sixteen_bits_stay_so(bundle, make_context):
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    pruned = PruneMagnitude()(bundle, make_context(bundle))
    lossless, rounded = (StoreSparse(dtype=d)(pruned, make_context(bundle)) for d in ("float32", "bfloat16"))
    assert lossless.notes == rounded.notes


def test_a_weight_that_a_type_does_not_hold_is_told(bundle, make_context):
    with torch.no_grad():
        bundle.model.model.norm.weight[0] = 1e6
    with pytest.raises(UserError, match="dtype: float16 does not hold the largest weights; use bfloat16"):
        StoreSparse(dtype="float16")(bundle, make_context(bundle))


def test_what_would_not_get_smaller_stays_dense(bundle, make_context, tmp_path):
    result = StoreSparse()(bundle, make_context(bundle))
    assert result.notes["matrices"] == 0
    manifest = result.save(tmp_path / "sparse")
    assert manifest.sparse == {}
    loaded = Bundle.load(tmp_path / "sparse")
    assert training_set.equal(training_set.weights(loaded), training_set.weights(bundle))


def test_a_stock_loader_fails_rather_than_invent_weights(bundle, make_context, tmp_path):
    from transformers import AutoModelForCausalLM

    PruneMagnitude()(bundle, make_context(bundle)).evolve(storage="sparse").save(tmp_path / "sparse")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def rewritten(folder: Path, change: Any) -> None:
    """Change the tensors of an artifact and let the manifest know the new length of the file."""
    tensors = load_file(folder / SPARSE)
    change(tensors)
    save_file(tensors, folder / SPARSE, metadata={"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][SPARSE]["bytes"] = (folder / SPARSE).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


NAME = "model.layers.0.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Any, str]] = {
    "a part is missing": (lambda t: t.pop(f"{NAME}.bitmask"), f"no '{NAME}.bitmask'"),
    "a value too few": (
        lambda t: t.update({f"{NAME}.values": t[f"{NAME}.values"][1:].clone()}),
        r"1023 values where its manifest says 1024",
    ),
    "a bit flipped": (lambda t: t[f"{NAME}.bitmask"][3].bitwise_xor_(1), "is damaged .1024 values where"),
    "a byte too many": (
        lambda t: t.update({f"{NAME}.bitmask": torch.nn.functional.pad(t[f"{NAME}.bitmask"], (0, 1))}),
        "bitmask of 257 bytes for 2048 weights",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_does_not_fit_its_manifest_is_told(damage, packed, bundle, make_context, tmp_path):
    change, message = DAMAGES[damage]
    PruneMagnitude()(bundle, make_context(bundle)).evolve(storage="sparse").save(tmp_path / "sparse")
    rewritten(tmp_path / "sparse", change)
    with pytest.raises(UserError, match=message) as error:
        Bundle.load(tmp_path / "sparse", packed=packed, verify=False)
    assert SPARSE in str(error.value)
    assert "\n" not in str(error.value)


def test_a_torn_file_is_told(bundle, make_context, tmp_path):
    PruneMagnitude()(bundle, make_context(bundle)).evolve(storage="sparse").save(tmp_path / "sparse")
    file = tmp_path / "sparse" / SPARSE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="missing or not of the"):
        Bundle.load(tmp_path / "sparse")


def test_manifests_written_before_there_was_sparse_storage_load(bundle, tmp_path):
    bundle.save(tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    for name in ("sparse", "storage"):
        del manifest[name]
    del manifest["seal"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    assert Manifest.read(tmp_path / "old" / "manifest.json").storage == "dense"
    assert training_set.equal(
        training_set.weights(Bundle.load(tmp_path / "old")), training_set.weights(bundle)
    )
