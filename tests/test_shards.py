"""A model that stays on disk is quantized to the same bytes, and its files are any other artifact's."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.artifact.bundle import Bundle
from compress.artifact.counts import code_files
from compress.artifact.shards import ShardReader, join
from compress.errors import UserError
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.passes.quantize_round import QuantizeRound

KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(KINDS)), min_size=1, max_size=8),
    st.integers(1, 400),
)
def test_joined_parts_hold_every_tensor_once_and_no_shard_too_much(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("join")
    tensors = {f"t{i}": torch.arange(n).to(kind) for i, (n, kind) in enumerate(sizes)}
    parts = []
    for number, name in enumerate(tensors):
        parts.append(folder / f"part-{number}.safetensors")
        save_file({name: tensors[name]}, parts[-1])
    shards = join(parts, folder, "whole", limit)
    found = {}
    for shard in shards:
        inside = load_file(shard)
        assert not found.keys() & inside.keys()
        size = sum(t.numel() * t.element_size() for t in inside.values())
        assert size <= limit or len([t for t in inside.values() if t.numel()]) == 1
        found |= inside
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [s.name for s in shards] == (
        ["whole.safetensors"]
        if len(shards) == 1
        else [f"whole-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )


@pytest.mark.parametrize(
    "step",
    [
        QuantizeRound(),
        QuantizeRound(embeddings=None),
        QuantizeGPTQ(),
        QuantizeGPTQ(asymmetric="heldout", batch=1),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_streaming_gives_the_same_artifact(bundle, make_context, tmp_path, step, tied):
    if not tied:
        bundle.model.config.tie_word_embeddings = False
        bundle.model.lm_head.weight = torch.nn.Parameter(bundle.model.lm_head.weight.detach().clone() * 1.1)
    bundle.save(tmp_path / "float")
    step(Bundle.load(tmp_path / "float"), make_context(bundle)).save(tmp_path / "whole")
    streamed = Bundle.load(tmp_path / "float", stream=True)
    assert all(p.is_meta for p in streamed.model.parameters())
    result = step(streamed, make_context(bundle, workdir="streaming"))
    blocks = result.model.model.layers
    assert all(t.is_meta for block in blocks for t in block.state_dict().values())
    assert all(p.is_meta for p in streamed.model.parameters())  # the input is as it was
    result.save(tmp_path / "streamed")
    one, other = (load_file(code_files(tmp_path / name)[0]) for name in ("whole", "streamed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    manifests = [
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "streamed")
    ]
    assert manifests[0]["layers"] == manifests[1]["layers"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [Bundle.load(tmp_path / name).model(input_ids=ids).logits for name in ("whole", "streamed")]
    assert torch.equal(*logits)


def test_several_shards_of_codes_load(bundle, make_context, tmp_path, monkeypatch):
    bundle.save(tmp_path / "float")
    result = QuantizeRound()(Bundle.load(tmp_path / "float", stream=True), make_context(bundle))
    monkeypatch.setattr(
        "compress.artifact.bundle.join", lambda parts, folder, stem: join(parts, folder, stem, 20_000)
    )
    result.save(tmp_path / "codes")
    assert len(code_files(tmp_path / "codes")) > 1
    loaded = Bundle.load(tmp_path / "codes").model
    whole = QuantizeRound()(bundle, make_context(bundle)).model
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_a_tensor_that_is_in_no_file_is_named(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    reader = ShardReader([tmp_path / "x.safetensors"])
    assert "a" in reader
    with pytest.raises(UserError, match="no tensor 'b'"):
        reader.read(["a", "b"])


def test_a_tied_table_leaves_memory_with_the_module_that_read_it(bundle, tmp_path):
    bundle.save(tmp_path / "float")
    clone = Bundle.load(tmp_path / "float", stream=True).clone()
    store = clone.offload(tmp_path / "parts")
    model = clone.model
    with store.loaded(["model.embed_tokens"]):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.lm_head.weight.is_meta
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_meta


def test_a_pass_that_wants_all_weights_refuses_a_model_whose_weights_are_on_disk(bundle, tmp_path):
    bundle.save(tmp_path / "float")
    with pytest.raises(UserError, match="prune_magnitude: needs all weights at once; .* without stream=True"):
        Bundle.load(tmp_path / "float", stream=True).apply(PruneMagnitude(sparsity=0.5))
