"""The walk: its statistics are those of a plain forward pass, and what changes on the way is seen."""

import gc
import itertools
from typing import Any

import pytest
import torch
from training_set import TINY, tiny_bundle

from compress.calibration.walk import walk
from compress.errors import UserError
from compress.models.create import random_model
from compress.models.layers import linear_layers, matrix

WINDOWS = torch.randint(0, 300, (5, 24), generator=torch.Generator().manual_seed(0))


def sliding_window() -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, use_sliding_window=True, sliding_window=6, max_window_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tuples() -> Any:
    """Blocks that give a tuple of one, whose first the model takes."""
    from transformers import AutoModelForCausalLM, GPTNeoConfig

    config = GPTNeoConfig(
        vocab_size=300, hidden_size=32, num_layers=4, num_heads=2, max_position_embeddings=64, window_size=8,
        attention_types=[[["global", "local"], 2]],
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "llama": lambda: random_model(TINY, 0),
    "gpt2": lambda: random_model(TINY.model_copy(update={"family": "gpt2"}), 0),
    "sliding_window": sliding_window,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def hooked(model: Any, names: list[str], windows: torch.Tensor = WINDOWS) -> dict[str, torch.Tensor]:
    """E[x x^T] of every named layer, from whole forward passes with hooks."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def look(_: Any, args: Any) -> None:
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.T @ x

        return look

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / windows.numel() for name, total in sums.items()}


def hooks_left(model: Any) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def forwards_replaced(model: Any) -> int:
    return sum("forward" in vars(m) for m in model.modules())


def test_the_walk_sees_what_a_plain_forward_pass_sees(model):
    names = linear_layers(model)
    expected = hooked(model, names)
    seen = []
    for visit in walk(model, WINDOWS, names, batch=2):
        hessian = visit.covariance.hessian / visit.covariance.count
        assert visit.covariance.drift is None
        assert visit.covariance.count == WINDOWS.numel()
        for name in visit.names:
            assert torch.allclose(hessian, expected[name], rtol=1e-3, atol=1e-5), name
        seen += visit.names
    assert sorted(seen) == sorted(names)
    assert hooks_left(model) == forwards_replaced(model) == 0


def test_blocks_that_give_tuples_are_walked_through():
    test_the_walk_sees_what_a_plain_forward_pass_sees(tuples())


def test_both_streams_are_equal_while_nothing_changes(model):
    for visit in walk(model, WINDOWS, linear_layers(model), both_streams=True, batch=2):
        weight = torch.cat([matrix(model.get_submodule(name)) for name in visit.names])
        aim = visit.covariance.aim(weight)
        assert aim.norm() < 1e-4 * (weight @ visit.covariance.hessian).norm()


def test_layers_with_one_input_are_visited_together_in_the_order_they_run():
    model = MODELS["llama"]()
    visits = list(walk(model, WINDOWS, sorted(linear_layers(model)), batch=2))
    assert [visit.block for visit in visits] == [i for i in range(4) for _ in range(4)]
    leaves = [[name.rpartition(".")[2] for name in visit.names] for visit in visits[:4]]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_attention_and_norms_run_once_per_block_batch_and_stream(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from compress.models import attention

    runs = {"forward": 0, "causal_attention": 0}

    def count(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            runs[name] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(LlamaRMSNorm, "forward")
    count(attention, "causal_attention")
    model = MODELS["llama"]()
    visits = walk(model, WINDOWS, linear_layers(model), both_streams=True, batch=2)
    seen = [dict(runs) for visit in visits if visit.names[0].endswith("q_proj")]
    batches, streams = 3, 2
    for before, after in itertools.pairwise(seen[1:]):  # from one block's begin to the next one's
        assert after["causal_attention"] - before["causal_attention"] == batches * streams
        assert after["forward"] - before["forward"] == 2 * batches * streams


def test_only_the_layers_asked_for_are_visited():
    model = MODELS["llama"]()
    names = ["model.layers.1.mlp.down_proj", "model.layers.3.self_attn.k_proj"]
    assert [(v.block, v.names) for v in walk(model, WINDOWS, names)] == [(1, names[:1]), (3, names[1:])]


def test_what_a_visit_changes_is_seen_by_all_later_ones(model):
    names = linear_layers(model)
    original = hooked(model, names)
    for visit in walk(model, WINDOWS, names, both_streams=True, batch=2):
        hessian = visit.covariance.hessian / visit.covariance.count
        now = hooked(model, visit.names)  # of the model as it has become
        for name in visit.names:
            assert torch.allclose(hessian, now[name], rtol=1e-3, atol=1e-5), name
        if visit.block > 0:
            assert not torch.allclose(hessian, original[visit.names[0]], rtol=1e-2)
            weight = torch.cat([matrix(model.get_submodule(name)) for name in visit.names])
            aim = visit.covariance.aim(weight)
            assert aim.norm() > 1e-2 * (weight @ visit.covariance.hessian).norm()
        with torch.no_grad():
            for name in visit.names:
                model.get_submodule(name).weight.mul_(1.5)


def test_the_original_of_a_block_is_gone_while_the_last_layers_are_solved(model):
    """Its memory is a block's, and the last layer of a block has the largest statistics."""
    kind = type(next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0])
    copies: dict[int, list[int]] = {}
    gc.freeze()  # what a large process holds already is not looked through again and again
    try:
        for visit in walk(model, WINDOWS, linear_layers(model), both_streams=True):
            gc.collect()
            living = sum(type(thing) is kind for thing in gc.get_objects())
            copies.setdefault(visit.block, []).append(living)
    finally:
        gc.unfreeze()
    assert all(found[0] - found[-1] == 1 for found in copies.values())


@pytest.mark.parametrize("residual", [True, False])
def test_the_aim_pairs_the_original_with_the_changed_inputs(residual):
    """W D + R by its definition; summed directly where a layer has fewer outputs than inputs."""
    model = MODELS["llama"]()
    wide, narrow = "model.layers.3.mlp.up_proj", "model.layers.3.mlp.down_proj"
    seen: dict[str, dict[str, torch.Tensor]] = {"original": {}, "changed": {}}

    def record(key: str) -> None:
        def watch(name: str, module: str) -> Any:
            def look(_: Any, args: Any) -> None:
                seen[key][name] = args[0].flatten(0, -2)

            return model.get_submodule(module).register_forward_pre_hook(look)

        watched = {wide: wide, narrow: narrow, "stream": "model.layers.3.post_attention_layernorm"}
        handles = [watch(name, module) for name, module in watched.items()]
        with torch.no_grad():
            model(input_ids=WINDOWS, use_cache=False)
        for handle in handles:
            handle.remove()

    record("original")
    for visit in walk(model, WINDOWS, linear_layers(model), both_streams=True, residual=residual, batch=2):
        for name in visit.names:
            if name in (wide, narrow):
                weight = matrix(model.get_submodule(name))
                out, columns = weight.shape
                assert (visit.covariance.drift is None) == (out < columns) == (name == narrow)
                record("changed")
                original, changed = seen["original"], seen["changed"]
                lacking = (original[name] - changed[name]) @ weight.T
                if residual and name == narrow:
                    lacking = lacking + original["stream"] - changed["stream"]
                expected = lacking.T @ changed[name]
                assert (visit.covariance.aim(weight) - expected).norm() < 1e-3 * expected.norm()
        with torch.no_grad():
            for name in visit.names:
                model.get_submodule(name).weight.mul_(1.3)


@pytest.mark.parametrize("ending", ["break", "raise"])
def test_nothing_is_left_behind_when_the_loop_ends_early(model, ending):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loop() -> None:
        for visit in walk(model, WINDOWS, linear_layers(model), both_streams=True):
            assert not model.training
            if visit.block == 1:
                if ending == "raise":
                    raise RuntimeError("the caller's own")
                break

    if ending == "raise":
        with pytest.raises(RuntimeError, match="the caller's own"):
            loop()
    else:
        loop()
    assert hooks_left(model) == forwards_replaced(model) == 0
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_fails_inside_is_left_as_it_was():
    model = MODELS["llama"]()
    beyond = torch.full((1, 4), 300)  # no such token
    with pytest.raises(IndexError):
        list(walk(model, beyond, linear_layers(model)))
    assert hooks_left(model) == forwards_replaced(model) == 0


def test_bfloat16_statistics_are_float32_and_close():
    model = MODELS["llama"]()
    names = linear_layers(model)
    expected = hooked(model, names)
    for visit in walk(model, WINDOWS, names, both_streams=True, precision="bfloat16"):
        hessian = visit.covariance.hessian / visit.covariance.count
        weight = torch.cat([matrix(model.get_submodule(name)) for name in visit.names])
        aim = visit.covariance.aim(weight) / visit.covariance.count
        assert hessian.dtype == aim.dtype == torch.float32
        wanted = expected[visit.names[0]]
        assert (hessian - wanted).norm() < 0.05 * wanted.norm()
        assert aim.norm() < 0.05 * (weight @ wanted).norm()


def test_a_layer_outside_the_blocks_is_refused():
    model = tiny_bundle(tie_embeddings=False).model
    with pytest.raises(UserError, match=r"'lm_head' is not inside the blocks"):
        next(walk(model, WINDOWS, ["lm_head"]))
    model.config.num_hidden_layers = 77
    with pytest.raises(UserError, match="no list of 77 blocks"):
        next(walk(model, WINDOWS, ["lm_head"]))
