"""Rows that make good each other's errors by what outputs do to the loss, and how that is found out."""

import pytest
import torch
import torch.nn.functional as F
from encoder_models import tiny_encoder
from training_set import tiny_bundle

from compress.artifact.bundle import Bundle
from compress.calibration.fisher import output_fisher
from compress.errors import UserError
from compress.formats import Int3
from compress.models.layers import matrix
from compress.passes.quantize_auto import QuantizeAuto
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.solvers.output_feedback import row_blocks, side_by_side

OUT, IN = 24, 16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(n, seed=0, directions=4):
    """Of vectors that share a few directions."""
    x = normal(400, directions, seed=seed) @ normal(directions, n, seed=seed + 1)
    x = (x + 0.3 * normal(400, n, seed=seed + 2)) * torch.linspace(0.5, 1.5, n)
    return x.T @ x / len(x)


def livelier(bundle):
    """Larger weights: predictions far from uniform, and blocks that do something."""
    with torch.no_grad():
        for name, weight in bundle.model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(4 if "layers" in name else 2)
    return bundle


def rounded(weight, fisher, size):
    target, values = weight.clone(), torch.empty_like(weight)
    for block in row_blocks(fisher, size, shrinkage=1e-4):
        values[block.rows] = target[block.rows].round()
        block.pass_on(target, target[block.rows] - values[block.rows])
    return values


def test_runs_stay_whole_and_in_their_order():
    fisher = moments(OUT)
    blocks = list(row_blocks(fisher, run=10))
    starts = [int(block.rows[0]) for block in blocks]
    assert sorted(starts[:2]) == [0, 10]
    assert [block.rows.tolist() for block in blocks] == [
        list(range(start, min(start + 10, OUT))) for start in starts
    ]
    means = [float(fisher.diagonal()[block.rows].mean()) for block in blocks[:2]]
    assert means[0] > means[1], "the shorter one, at the end, comes last"


def test_later_rows_go_where_the_cost_is_least():
    """The closed form: with D_b given, F_rb D_b + F_rr D_r = 0; rows that move by M have the error -M."""
    fisher = moments(OUT)
    first = next(iter(row_blocks(fisher, 5, shrinkage=1e-7)))
    target, lost = torch.zeros(OUT, IN), normal(5, IN, seed=9)
    first.pass_on(target, lost)
    rows, later = first.rows, first.later
    moved = torch.linalg.solve(fisher[later][:, later], fisher[later][:, rows] @ lost)
    torch.testing.assert_close(target[later], moved, rtol=1e-3, atol=1e-4)
    assert not target[rows].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 4, 5])
def test_rows_are_moved_to_where_the_whole_cost_is_least(seed, size):
    """tr(F D H D^T) over all later rows at once, by a system for every block, in float64; any H gives it."""
    fisher, hessian, weight = (
        moments(OUT, seed),
        moments(IN, seed + 9).double(),
        3 * normal(OUT, IN, seed=seed),
    )
    whole = 0.7 * fisher.double() + 0.3 * fisher.double().diagonal().mean() * torch.eye(OUT)
    order = sorted(range(OUT), key=lambda i: -float(fisher[i, i]))
    target, values = weight.double().clone(), torch.zeros(OUT, IN, dtype=torch.double)
    ours = weight.clone()
    for start, block in zip(range(0, OUT, size), row_blocks(fisher, size), strict=True):
        rows, later = order[start : start + size], order[start + size :]
        assert block.rows.tolist() == rows
        assert block.later.tolist() == later
        values[rows] = target[rows].round()
        block.pass_on(ours, ours[rows] - values[rows].float())
        lost = target[rows] - values[rows]
        # F_rb D_b H + F_rr D_r H = 0
        right = -whole[later][:, rows] @ lost @ hessian
        moved = torch.linalg.solve(whole[later][:, later], right) @ torch.linalg.inv(hessian)
        target[later] -= moved
        torch.testing.assert_close(ours[later].double(), target[later], rtol=1e-3, atol=1e-3)


def test_the_cost_falls_with_smaller_blocks_under_any_moments_of_the_inputs():
    """What feedback between rows is for; the inputs' moments play no part in it."""
    costs = torch.zeros(4)
    for seed in range(20):
        weight, fisher, hessian = 3 * normal(OUT, IN, seed=seed), moments(OUT, seed), moments(IN, seed + 50)
        for k, size in enumerate((OUT, 8, 4, 1)):
            lost = weight - rounded(weight, fisher, size)
            costs[k] += torch.trace(fisher @ lost @ hessian @ lost.T)
    assert (costs.diff() < 0).all()
    assert costs[-1] < 0.5 * costs[0]


def test_outputs_that_are_not_known_or_not_related_are_rounded_plainly():
    weight = 3 * normal(OUT, IN)
    for fisher in (torch.zeros(OUT, OUT), torch.diag(torch.linspace(1, 9, OUT))):
        assert torch.equal(rounded(weight, fisher, 4), weight.round())


def test_stacked_matrices_are_visited_side_by_side():
    visits = list(side_by_side([moments(10), moments(5)], size=4))
    assert [[len(block.rows) for block in blocks] for blocks in visits] == [[4, 4], [4, 1], [2]]
    rows = torch.cat([block.rows for blocks in visits for block in blocks])
    assert sorted(rows.tolist()) == list(range(15))
    assert all((block.later >= 10).all() for block in (visits[0][1], visits[1][1]))
    assert all((block.later < 10).all() for block in (visits[0][0], visits[1][0]))


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"])
def test_half_the_fisher_information_is_the_kl_of_a_small_error(bundle, name):
    model = livelier(bundle).model.double().eval()
    windows = torch.randint(0, model.config.vocab_size, (96, 32), generator=torch.Generator().manual_seed(0))
    (fisher,) = output_fisher(model, windows, [name], tokens=windows.numel(), seed=0)[name]
    assert all(p.requires_grad for p in model.parameters())
    layer = model.get_submodule(name)
    values, vectors = torch.linalg.eigh(fisher)
    assert values[0] > -1e-6 * values[-1]
    for direction in (vectors[:, -1], vectors[:, len(values) // 2]):
        scale = 0.01 / (direction @ fisher @ direction).sqrt()
        found = []
        for seed in range(8):
            signs = normal(*windows.shape, 1, seed=seed).sign().double()
            with torch.no_grad():
                before = model(input_ids=windows).logits.log_softmax(-1)
                error = scale * signs * direction.double()
                handle = layer.register_forward_hook(lambda module, given, y, error=error: y + error)
                after = model(input_ids=windows).logits.log_softmax(-1)
                handle.remove()
            found.append(F.kl_div(after, before, log_target=True, reduction="sum") / windows.numel())
        assert torch.stack(found).mean() == pytest.approx(0.5 * 0.01**2, rel=0.2)


def test_wide_layers_are_weighed_in_parts(bundle, monkeypatch):
    name = "model.layers.0.mlp.up_proj"
    windows = torch.arange(64).view(2, 32)
    (whole,) = output_fisher(bundle.model, windows, [name], tokens=64, seed=0)[name]
    monkeypatch.setattr("compress.calibration.fisher._TOGETHER", 40)
    parts = output_fisher(bundle.model, windows, [name], tokens=64, seed=0)[name]
    assert [len(part) for part in parts] == [40, 24]
    torch.testing.assert_close(torch.block_diag(*parts)[:40, :40], whole[:40, :40])
    torch.testing.assert_close(parts[-1], whole[-len(parts[-1]) :, -len(parts[-1]) :])


def test_a_layer_loses_less_of_what_counts(make_context):
    """Through the pass, by the Fisher information of tokens that were drawn anew."""
    bundle = livelier(tiny_bundle(intermediate=256))  # of rows for eight blocks
    context = make_context(bundle)
    names = [f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up")]  # nothing before them is rounded
    windows = torch.from_numpy(context.data.calibration.tokens).long()
    inputs = []
    reader = bundle.model.get_submodule(names[0])
    handle = reader.register_forward_pre_hook(lambda module, given: inputs.append(given[0].flatten(0, -2)))
    fisher = output_fisher(bundle.model, windows, names, tokens=windows.numel(), seed=99)
    handle.remove()
    x = torch.cat(inputs).detach()

    def cost(outputs):
        step = QuantizeGPTQ(format=Int3(group=32), embeddings=None, select=tuple(names), outputs=outputs)
        model = step(bundle, context).model
        lost = {n: matrix(bundle.model.get_submodule(n)) - matrix(model.get_submodule(n)) for n in names}
        return sum(float(((x @ lost[n].T @ fisher[n][0]) * (x @ lost[n].T)).sum()) for n in names)

    assert cost("fisher") < 0.7 * cost("alike")


def test_pruned_weights_stay_zero_and_a_streamed_model_is_taken_whole(bundle, make_context, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    weight = bundle.model.get_submodule(name).weight
    mask = normal(*weight.shape) > 0
    weight.data.mul_(mask)
    pruned = bundle.evolve(masks={name: mask})
    pruned.save(tmp_path / "pruned")
    step = QuantizeGPTQ(outputs="fisher")
    whole = step(Bundle.load(tmp_path / "pruned"), make_context(bundle))
    assert not whole.model.get_submodule(name).quantized.dequantize()[~mask].any()
    streamed = step(Bundle.load(tmp_path / "pruned", stream=True), make_context(bundle, workdir="streaming"))
    one, other = (m.model.get_submodule(name).quantized.unpacked() for m in (whole, streamed))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "step", [QuantizeGPTQ(outputs="fisher"), QuantizeAuto(outputs="fisher", largest_kl=1)]
)
def test_only_a_decoders_outputs_are_weighed(step):
    with pytest.raises(UserError, match="outputs: 'fisher' draws a decoder's next tokens"):
        step.layers(tiny_encoder("bert").model)
