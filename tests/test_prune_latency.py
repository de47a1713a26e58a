"""Latency targets: how shares of time are found, what may be lost for them, and what is said beyond that."""

import re
import statistics
from typing import Any

import numpy as np
import pytest
import torch
import training_set
from pydantic import ValidationError
from test_prune_structured import encoder, livelier

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.passes.prune_structured import PruneStructured
from compress.structured import costs as costs_module
from compress.structured.costs import first_of
from compress.structured.judging import Judge
from compress.structured.procedure import ModelShape
from compress.structured.slicing import UnitCounts
from compress.structured.structure import find_structure
from compress.structured.target import CostTarget
from compress.structured.timing import decode_shares, timed


@pytest.fixture
def small() -> Bundle:
    return livelier(training_set.tiny_bundle(heads=4, kv_heads=2, layers=2))


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def timed_by_parameters(monkeypatch):
    """A share of time that is the share of parameters, but for a factor of its own each time it is asked."""
    asked: list[int] = []
    factors: list[float] = []

    def shares(model: Any, whole: Any, rounds: int = 8) -> tuple[float, list[float]]:
        asked.append(rounds)
        share = parameters(model) / parameters(whole) * (factors.pop(0) if factors else 1.0)
        return share, [share] * rounds

    monkeypatch.setattr(costs_module, "decode_shares", shares)
    return asked, factors


class FakeClock:
    """Goes on by what a model's forward pass is said to take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0

    def __call__(self) -> float:
        return self.now

    def of(self, seconds: float, disturbed: bool) -> Any:
        def forward(*_: Any) -> None:
            self.calls += 1
            # of three steps one waits for another program, and the machine gets slower and slower
            self.now += seconds * (1 + self.calls / 1000) + (
                50.0 if disturbed and self.calls % 3 == 0 else 0.0
            )

        return forward


@pytest.mark.parametrize("disturbed", [False, True])
def test_a_share_is_that_of_the_steps_whatever_else_runs(disturbed):
    models, clock = [training_set.tiny_bundle(layers=1).model for _ in range(2)], FakeClock()
    for model, seconds in zip(models, (2.0, 5.0), strict=True):
        model.register_forward_hook(clock.of(seconds, disturbed))
    share, rounds = decode_shares(*models, rounds=12, clock=clock)
    assert share == pytest.approx(0.4, rel=0.02)
    assert len(rounds) == 12
    assert statistics.median(rounds) == pytest.approx(0.4, rel=0.1)


def test_a_smaller_model_takes_less_time_on_this_machine():
    """Wide margins: the share of a model with a thirtieth of the neurons, and of one like the whole."""
    bundle = training_set.tiny_bundle(hidden=256, intermediate=2048, layers=2, context=128)
    structure = find_structure(bundle.model)
    counts = UnitCounts.of(structure)
    like = first_of(bundle.model, structure, ModelShape(2, counts))
    few = first_of(bundle.model, structure, ModelShape(2, UnitCounts(counts.heads, 64, counts.width)))
    assert 0.6 < decode_shares(like, bundle.model)[0] < 1.6
    assert decode_shares(few, bundle.model)[0] < decode_shares(like, bundle.model)[0]


def test_a_target_in_seconds_is_met_by_what_was_measured(small, make_context, timed_by_parameters):
    target = {"latency": 0.8, "take": ["neurons"], "largest_loss": 50.0}
    result = PruneStructured(target=target, multiple_of=1)(small, make_context(small))
    share = parameters(result.model) / parameters(small.model)
    assert 0.78 < share <= 0.8
    notes = result.notes["target"]
    assert notes["reached"] == pytest.approx(share)
    assert notes["quartiles"] == pytest.approx([share, share])
    assert 0 < notes["loss"] < notes["largest_loss"] == 50.0
    assert "decode in torch" in notes["measured"]
    assert timed_by_parameters[0][-1] == costs_module.CAREFUL, "what is reported was timed for longer"


def test_a_time_that_was_low_by_chance_is_not_believed(small, make_context, timed_by_parameters):
    timed_by_parameters[1].extend([1.0] * 1 + [0.8])  # what the second shape that is asked for seems to take
    target = {"latency": 0.8, "take": ["neurons"], "largest_loss": 50.0}
    result = PruneStructured(target=target, multiple_of=1)(small, make_context(small))
    share = parameters(result.model) / parameters(small.model)
    assert result.notes["target"]["reached"] == pytest.approx(share)
    assert share <= 0.8 * 1.03


def test_a_model_is_not_destroyed_for_a_target(small, make_context, timed_by_parameters):
    target = {"latency": 0.75, "take": ["neurons"], "largest_loss": 1e-3, "shapes": 1}
    with pytest.raises(UserError) as error:
        PruneStructured(target=target, multiple_of=1)(small, make_context(small))
    said = str(error.value)
    assert "\n" not in said
    assert re.search(
        r"what meets 0.75 \(2 blocks, 2 heads, \d+ neurons\) loses \S+ nats per token, beyond", said
    )
    assert "largest_loss 0.001; give a larger latency, or a larger largest_loss and heal" in said
    points = re.findall(r"(0\.\d\d) for (\S+) nats \(2 blocks, 2 heads, (\d+) neurons\)", said)
    shares, losses, neurons = ([float(x) for x in column] for column in zip(*points, strict=True))
    assert len(points) == 4
    assert shares == sorted(shares, reverse=True)
    assert neurons == sorted(neurons, reverse=True)
    assert losses[0] < losses[-1]


def test_a_latency_that_no_shape_has_is_refused_with_what_can_be_had(
    small, make_context, timed_by_parameters
):
    with pytest.raises(UserError, match=r"0.01 cannot be met by taking neurons.*had: 0\.\d\d for .* nats \("):
        PruneStructured(target={"latency": 0.01, "take": ["neurons"]}, multiple_of=1)(
            small, make_context(small)
        )


def test_other_targets_have_a_bound_where_one_is_given(small, make_context):
    target = {"parameters": 0.8, "largest_loss": 1e-3}
    with pytest.raises(UserError, match=r"target.parameters: what meets 0.8 .*had: [\d,]+ for \S+ nats"):
        PruneStructured(target=target, multiple_of=1)(small, make_context(small))
    assert not CostTarget(parameters=0.5).bounded
    assert CostTarget(latency=0.5).bounded
    assert CostTarget(parameters=0.5, largest_loss=3).bounded
    with pytest.raises(ValidationError, match="largest_loss"):
        CostTarget(latency=0.5, largest_loss=0)


def test_without_a_bound_half_of_what_one_answer_loses_may_be_lost(small, make_context, timed_by_parameters):
    windows = torch.from_numpy(make_context(small).data.calibration.tokens).long()
    judge = Judge(lambda shape, few: small.model, small.model, windows, CostTarget(latency=0.8))
    with torch.no_grad():
        p = small.model(input_ids=windows[2:3]).logits[0].double().softmax(-1).numpy()
    mean = p.mean(0)
    assert judge.bound == pytest.approx(0.5 * (p * np.log(p / mean)).sum(-1).mean(), rel=1e-4)
    assert judge(ModelShape(2, UnitCounts(2, 64, 32))) == pytest.approx(0, abs=1e-5)


def test_a_loss_that_is_no_number_is_beyond_every_bound(
    small, make_context, timed_by_parameters, monkeypatch
):
    monkeypatch.setattr("compress.structured.judging.Judge.__call__", lambda self, shape: float("nan"))
    with pytest.raises(UserError, match="loses nan nats per token, beyond largest_loss"):
        PruneStructured(target={"latency": 0.8}, multiple_of=1)(small, make_context(small))


def test_an_encoder_is_timed_by_a_text():
    bundle = training_set.tiny_bundle(layers=1)
    assert timed(bundle.model) == "decode"
    clock = FakeClock()
    models = [encoder().model for _ in range(2)]
    for model, seconds in zip(models, (2.0, 5.0), strict=True):
        model.register_forward_hook(clock.of(seconds, False))
    share, rounds = decode_shares(*models, rounds=6, clock=clock)
    assert share == pytest.approx(0.4, rel=0.02)
    assert len(rounds) == 6
    assert timed(models[0]) == "a text of 64 tokens"
