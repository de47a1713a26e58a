"""A large artifact is compared with what was to be written, whichever way it is written."""

import pytest
import torch
from export_models import tiny_bundle as tiny_export
from safetensors.torch import load_file, save_file
from training_set import equal, weights
from transformers import MixtralConfig, MixtralForCausalLM

from compress.artifact import bundle as bundles
from compress.artifact import reopened
from compress.artifact.bundle import Bundle
from compress.artifact.counts import code_files
from compress.errors import UserError
from compress.formats import Coded
from compress.models.checkpoints import weight_files
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.prune_wanda import PruneWanda
from compress.passes.quantize_round import QuantizeRound
from compress.passes.store_sparse import StoreSparse

NORM = "model.layers.1.input_layernorm.weight"


def block_by_block(bundle, folder):
    bundle.save(folder)
    return Bundle.load(folder, stream=True)


def sparse(bundle, lend, packed=False, codes=False):
    made = PruneMagnitude(sparsity=0.7)(bundle, lend(bundle))
    made = QuantizeRound()(made, lend(bundle)) if codes else made
    return StoreSparse(packed=packed)(made, lend(bundle))


WAYS = {
    "float": lambda bundle, lend, folder: bundle,
    "codes": lambda bundle, lend, folder: QuantizeRound()(bundle, lend(bundle)),
    "streams": lambda bundle, lend, folder: QuantizeRound(format=Coded(rate=4))(bundle, lend(bundle)),
    "sparse": lambda bundle, lend, folder: sparse(bundle, lend),
    "packed": lambda bundle, lend, folder: sparse(bundle, lend, packed=True),
    "sparse codes": lambda bundle, lend, folder: sparse(bundle, lend, codes=True),
    "parts": lambda bundle, lend, folder: PruneWanda(sparsity=0.5)(
        block_by_block(bundle, folder), lend(bundle)
    ),
    "parts of codes": lambda bundle, lend, folder: QuantizeRound()(
        block_by_block(bundle, folder), lend(bundle)
    ),
}


def dropped(state):
    del state[NORM]


def emptied(state):
    """One matrix or what stands for it, at its end only."""
    name = max(state, key=lambda n: state[n].numel() if "layers.2" in n else 0)
    flat = state[name].reshape(-1)
    flat[-1] = flat[-1] + 1


def narrowed(state):
    state[NORM] = state[NORM].to(torch.float16 if state[NORM].dtype != torch.float16 else torch.bfloat16)


def reshaped(state):
    state[NORM] = state[NORM].reshape(2, -1)


def added(state):
    state["model.layers.1.input_layernorm.bias"] = torch.zeros(3)


@pytest.mark.parametrize("damage", [dropped, emptied, narrowed, reshaped, added])
@pytest.mark.parametrize("way", WAYS)
def test_whatever_is_written_otherwise_is_refused(way, damage, bundle, make_context, tmp_path, monkeypatch):
    made = WAYS[way](bundle, make_context, tmp_path / "base")
    assert bool(made.parts) == way.startswith("parts")
    monkeypatch.setattr(reopened, "_WHOLE", 0)
    made.save(tmp_path / "whole")
    real = bundles.write_bits  # the next thing that `save` calls

    def after_a_bad_writer(*given):
        folder = given[-1]
        file = (code_files(folder) or list(weight_files(folder)))[0]
        state = {name: tensor.clone() for name, tensor in load_file(file).items()}
        damage(state)
        save_file(state, file, metadata={"format": "pt"})
        real(*given)

    monkeypatch.setattr(bundles, "write_bits", after_a_bad_writer)
    with pytest.raises(UserError, match="what was written is not what was to be saved: .*'") as told:
        made.save(tmp_path / "bad")
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("bad*"))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma3", "phi"])
def test_large_models_of_other_families_come_back(name, tmp_path, monkeypatch):
    monkeypatch.setattr(reopened, "_WHOLE", 0)
    made = tiny_export(name)
    made.save(tmp_path / "a")
    assert equal(weights(Bundle.load(tmp_path / "a")), weights(made))


def test_of_a_large_model_with_other_names_on_disk_no_weights_are_lacking(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(reopened, "_WHOLE", 0)
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    made = bundle.evolve(model=MixtralForCausalLM(config).eval())
    made.save(tmp_path / "a")
    names = load_file(tmp_path / "a" / "model.safetensors")
    assert not names.keys() <= made.model.state_dict().keys()  # experts are stored one by one
    assert equal(weights(Bundle.load(tmp_path / "a")), weights(made))
    real = bundles.write_bits

    def after_a_bad_writer(*given):
        state = load_file(given[-1] / "model.safetensors")
        expert = next(name for name in state if "experts.1" in name)
        del state[expert]
        save_file(state, given[-1] / "model.safetensors", metadata={"format": "pt"})
        real(*given)

    monkeypatch.setattr(bundles, "write_bits", after_a_bad_writer)
    with pytest.raises(UserError, match="values of a model of"):
        made.save(tmp_path / "bad")
