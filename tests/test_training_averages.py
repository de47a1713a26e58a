"""Averages of weights and rates of modules, against their definitions on single numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.errors import UserError
from compress.training import rates
from compress.training.averaging import Average


def numbers(count: int) -> list[float]:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).double().tolist()


def after_each(kind, share, values):
    """The average after every step of a weight that takes these values."""
    layer = nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    layer.weight.data.fill_(99.0)
    average, found = Average(layer, kind, share, len(values)), []
    assert set(average.tensors) == ({"weight"} if kind != "none" else set())
    for step, value in enumerate(values):
        layer.weight.data.fill_(value)
        average.update(step)
        found.append(float(average.tensors["weight"]) if kind != "none" else None)
    return found


@given(st.integers(1, 25), st.floats(0, 1))
def test_the_tail_is_the_plain_mean_of_the_last_steps(steps, share):
    values = numbers(steps)
    span = max(1, round(share * steps))
    found = after_each("tail", share, values)
    for step in range(steps):
        counted = values[steps - span : step + 1]
        expected = sum(counted) / len(counted) if counted else 99.0  # nothing yet: what it started with
        assert found[step] == pytest.approx(expected, abs=1e-5)


@given(st.integers(1, 25), st.floats(0, 1))
def test_the_moving_mean_is_plain_up_to_its_horizon_and_exponential_from_there(steps, share):
    values = numbers(steps)
    span, expected = max(1, round(share * steps)), 0.0
    for step, found in enumerate(after_each("ema", share, values)):
        weight = 1 / min(step + 1, span)
        expected = (1 - weight) * expected + weight * values[step]
        assert found == pytest.approx(expected, abs=1e-5)


def test_no_average_keeps_nothing():
    assert after_each("none", 0.5, [1.0, 2.0]) == [None, None]
    assert Average(nn.Linear(1, 1), "none", 0.5, 4).coefficient(3) is None


def test_swapping_exchanges_and_comes_back_even_after_an_error():
    layer = nn.Linear(1, 1)
    average = Average(layer, "ema", 1.0, 2)
    layer.weight.data.fill_(4.0)
    average.update(0)
    layer.weight.data.fill_(2.0)
    average.update(1)

    def inside():
        with average.swapped():
            assert (layer.weight.item(), average.tensors["weight"].item()) == (3.0, 2.0)
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert (layer.weight.item(), average.tensors["weight"].item()) == (2.0, 3.0)


class Model(nn.Module):
    """Two blocks and a table that the head shares."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(2))
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.table.weight


def test_a_pattern_takes_all_inside_and_shared_ones_under_their_first_name():
    model = Model()
    assert rates.chosen(model, "head") == {"table.weight"}
    assert rates.chosen(model, "blocks.1") == {
        "blocks.1.0.weight", "blocks.1.0.bias", "blocks.1.1.weight", "blocks.1.1.bias",
    }  # fmt: skip
    assert rates.chosen(model, "*.0") == {
        "blocks.0.0.weight", "blocks.0.0.bias", "blocks.0.1.weight", "blocks.0.1.bias",
        "blocks.1.0.weight", "blocks.1.0.bias",
    }  # fmt: skip
    assert rates.chosen(model, "nothing") == set()


def test_the_last_factor_that_fits_decides():
    slower = tuple(
        rates.Slower(modules=m, factor=f) for m, f in (("blocks", 0.5), ("blocks.1", 0.1), ("head", 2.0))
    )
    found = rates.factors(Model(), slower)
    assert found["blocks.0.0.weight"] == 0.5
    assert found["blocks.1.1.bias"] == 0.1
    assert found["table.weight"] == 2.0
    assert len(found) == 9


def test_frozen_parameters_learn_again_but_not_those_that_did_not_before():
    model = Model()
    model.blocks[0][0].bias.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}

    def inside():
        with rates.frozen(model, ("blocks.0", "head")):
            still = {n for n, p in model.named_parameters() if not p.requires_grad}
            assert still == {"table.weight", *(n for n in before if n.startswith("blocks.0."))}
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("freeze", "slower", "message"),
    [
        (("blcks",), (), "freeze: 'blcks' fits no module; did you mean 'blocks'"),
        ((), ("blocks.7",), "slower: 'blocks.7' fits no module"),
        (("blocks", "table"), (), "leaves nothing to train; name fewer modules"),
    ],
)
def test_what_cannot_be_is_refused(freeze, slower, message):
    entries = tuple(rates.Slower(modules=m, factor=0.5) for m in slower)
    with pytest.raises(UserError, match=message):
        rates.check(Model(), freeze, entries)
    rates.check(Model(), ("blocks",), (rates.Slower(modules="head", factor=0.5),))
