"""What a teacher is asked: samples, hidden states, relations, the student's own text; several teachers."""

import numpy as np
import pytest
import torch
from cli_helpers import invoke, refused, write_recipe, write_text
from training_set import WINDOW, equal, tiny_bundle, tiny_context, weights

from compress.artifact.bundle import Bundle
from compress.artifact.counts import parameter_counts
from compress.errors import UserError
from compress.passes.distill import Distill
from compress.passes.train import Train
from compress.training import checkpoint
from compress.training.teaching import matching, sampled
from compress.training.teaching.onpolicy import continued, drawn, draws, on_policy
from compress.training.teaching.teachers import Teachers

FEW = {"tokens": 10 * 4 * WINDOW, "batch": 4, "heldout_points": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    base = tiny_bundle()
    context = tiny_context(base, tmp_path_factory.mktemp("teacher"))
    return Train(tokens=80 * 4 * WINDOW, batch=4)(base, context)


def student(**changes):
    return tiny_bundle(seed=5, **{"layers": 2, **changes})


def test_cached_targets_teach_nearly_as_well_as_the_teacher_beside(teacher, tmp_path):
    settings = {"tokens": 60 * 4 * WINDOW, "batch": 4, "heldout_points": 2, "cross_entropy": 0.0}
    start, notes = student(), {}
    for targets in ("online", "cached"):
        context = tiny_context(start, tmp_path / targets, teacher)
        notes[targets] = Distill(**settings, targets=targets)(start, context).notes
    cached = notes["cached"]
    fell = {t: n["heldout_before"] - n["heldout_after"] for t, n in notes.items()}
    assert fell["online"] > 1
    assert fell["cached"] > 0.9 * fell["online"]
    # the loss itself is an estimate of the KL, not the KL plus an entropy
    assert cached["loss_curve"][-1][2] == pytest.approx(notes["online"]["loss_curve"][-1][2], abs=0.15)
    assert cached["target_samples"] == 12
    assert cached["target_bytes"] == pytest.approx(cached["target_positions"] * (12 * 6 + 4), rel=0.02)
    assert cached["epochs"] > 1
    assert cached["target_positions"] <= cached["tokens"] / cached["epochs"] * 1.01


def test_a_resumed_run_reuses_its_targets_and_ends_with_the_same_bytes(teacher, tmp_path, monkeypatch):
    start = student()
    step = Distill(**FEW, targets="cached", checkpoint_seconds=0.0)
    whole = step(start, tiny_context(start, tmp_path / "whole", teacher))
    monkeypatch.setattr(sampled, "_PART", 16)
    save, write, written = checkpoint.save, sampled.SampledTargets._write, []

    def interrupted(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    def counted(self, number, *arguments):
        if len(written) == 1:
            written.append(None)
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, *arguments)

    monkeypatch.setattr(sampled.SampledTargets, "_write", counted)
    context = tiny_context(start, tmp_path / "cut", teacher)
    with pytest.raises(KeyboardInterrupt):
        step(start, context)
    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(start, context)
    monkeypatch.setattr(checkpoint, "save", save)
    result = step(start, context)
    parts = [number for number in written if number is not None]
    assert parts == sorted(set(parts))
    assert len(parts) > 1
    assert equal(weights(whole), weights(result))
    # another teacher's answers are not taken for this one's
    other = step(start, tiny_context(start, tmp_path / "cut", tiny_bundle(seed=9)))
    assert len(written) == 2 * len(parts) + 1
    assert not equal(weights(other), weights(result))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "reverse_kl"}, "estimate forward_kl only, not reverse_kl"),
        ({"hidden": 1.0}, "which hidden needs; use online"),
        ({"on_policy": 0.5}, "which on_policy needs; use online"),
    ],
)
def test_what_cached_targets_cannot_give_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Distill(targets="cached", **fields)


def test_relations_equal_their_definition_and_ignore_width_and_rotation():
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(2, 5, 12, generator=generator)
    s = torch.randn(2, 5, 6, generator=generator)
    expected = 0.0
    for row in range(2):
        for head in range(3):
            scores = [x[row, :, head * d : (head + 1) * d] for x, d in ((t, 4), (s, 2))]
            later = torch.ones(5, 5).triu(1) > 0
            masked = [(x @ x.T / x.shape[1] ** 0.5).masked_fill(later, -1e9) for x in scores]
            log = [torch.log_softmax(x, -1) for x in masked]
            expected += float((log[0].exp() * (log[0] - log[1])).sum()) / (2 * 3 * 5)
    assert float(matching.relation_divergence(s, t, 3, causal=True)) == pytest.approx(expected, rel=1e-4)
    turned = t.view(2, 5, 3, 4) @ torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    assert abs(float(matching.relation_divergence(turned.flatten(2), t, 3, causal=False))) < 1e-5


def test_hidden_states_are_matched_through_a_map_when_widths_differ():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 8, generator=generator)
    assert float(matching.hidden_distance(wide, wide, torch.nn.Identity())) == 0
    assert float(matching.hidden_distance(0 * wide, wide, torch.nn.Identity())) == pytest.approx(1)
    through = torch.nn.Linear(4, 8, bias=False)
    narrow = torch.randn(7, 4, generator=generator)
    exact = narrow @ through.weight.detach().T
    assert matching.hidden_distance(narrow, exact, through).item() < 1e-10


@pytest.mark.parametrize(
    "shape", [{"hidden": 16, "heads": 1, "intermediate": 32}, {"family": "gpt2", "hidden": 16}]
)
def test_a_student_of_another_width_comes_nearer_inside(shape, teacher, tmp_path):
    """What is matched falls, and the maps are thrown away: the student is an ordinary model."""
    start = student(**shape)
    context = tiny_context(start, tmp_path, teacher)
    more = {**FEW, "tokens": 30 * 4 * WINDOW}
    step = Distill(**more, hidden=3.0, relations=100.0, fade=1.0)
    far = Distill(**more)(start, tiny_context(start, tmp_path / "plain", teacher))
    state = torch.random.get_rng_state()
    near = step(start, context)
    assert torch.equal(torch.random.get_rng_state(), state), "the maps' start is not drawn from it"
    assert near.notes["hidden_pairs"] == [[0, 1], [1, 3]]
    assert weights(near).keys() == weights(start).keys()
    tokens = torch.from_numpy(context.data.heldout.tokens).long()

    def apart(model):
        ours, theirs = matching.attention_inputs(model, -1), matching.attention_inputs(teacher.model, -1)
        taps = matching.Taps(ours), matching.Taps(theirs)
        with taps[0].on(model), taps[1].on(teacher.model), torch.no_grad():
            model(tokens), teacher.model(tokens)
            pairs = zip(matching.parts(taps[0], ours), matching.parts(taps[1], theirs), strict=True)
            return sum(
                float(matching.relation_divergence(a, b, near.notes["relation_heads"], True))
                for a, b in pairs
            )

    assert apart(near.model) < 0.8 * apart(far.model)
    assert equal(weights(near), weights(step(start, tiny_context(start, tmp_path / "again", teacher))))


def test_after_the_fade_nothing_inside_is_matched(teacher, tmp_path):
    """With everything faded after the first step of ten, the rest goes as without."""
    start = student()
    brief = Distill(**FEW, hidden=3.0, fade=0.1)(start, tiny_context(start, tmp_path / "a", teacher))
    plain = Distill(**FEW)(start, tiny_context(start, tmp_path / "b", teacher))
    losses = [[p[2] for p in r.notes["loss_curve"]] for r in (brief, plain)]
    assert losses[0][0] > losses[1][0] + 1
    assert losses[0][-1] == pytest.approx(losses[1][-1], abs=0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 1.0, "hidden_pairs": ((0, 9),)}, "hidden_pairs: block 9 of a model with 4"),
        ({"relations": 1.0, "relation_blocks": (7, 0)}, "relation_blocks: block 7 of a model with 2"),
        (
            {"relations": 1.0, "relation_heads": 5},
            "relation_heads: 5 does not divide .*, as 4",
        ),
        ({"hidden": 1.0, "teachers": ({}, {})}, "matched with one teacher"),
    ],
)
def test_what_the_models_do_not_have_is_refused(fields, message, teacher, tmp_path):
    start = student()
    with pytest.raises(UserError, match=message):
        Distill(**FEW, **fields)(start, tiny_context(start, tmp_path, teacher))


def test_several_teachers_are_the_weighted_mean_of_their_distributions(teacher, tmp_path):
    other = tiny_bundle(seed=9)
    both = Teachers(student(), [(teacher, 3.0), (other, 1.0)], torch.device("cpu"), "float32", "distill", 8)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        p = [torch.softmax(b.model(tokens).logits[0] / 2, -1) for b in (teacher, other)]
    found = torch.softmax(both.logits(tokens, 2.0) / 2, -1)
    torch.testing.assert_close(found, 0.75 * p[0] + 0.25 * p[1])
    # named by folder, in a recipe's field; another vocabulary is told by name
    other.save(tmp_path / "other")
    fields = {"teachers": ({}, {"model": str(tmp_path / "other"), "weight": 0.5})}
    start = student()
    notes = Distill(**FEW, **fields)(start, tiny_context(start, tmp_path / "w", teacher)).notes
    assert [weight for _, weight in notes["teachers"]] == pytest.approx([2 / 3, 1 / 3])
    assert Distill(**fields).reads() == (str(tmp_path / "other"),)
    tiny_bundle(vocab_size=290).save(tmp_path / "foreign")
    with pytest.raises(UserError, match="'tiny' has another tokenizer"):
        Distill(teachers=({"model": str(tmp_path / "foreign")},))(start, tiny_context(start, tmp_path / "f"))


def test_the_students_own_text_keeps_its_prompt_and_follows_its_distribution(teacher):
    rows = torch.arange(3 * 33).view(3, 33) % 300
    own = continued(teacher.model, rows.repeat(50, 1), 30, "float32", draws(1, 2, np.arange(150), 3))
    assert torch.equal(own[:, :30], rows.repeat(50, 1)[:, :30])
    with torch.no_grad():
        p = torch.softmax(teacher.model(rows[:, :30]).logits[:, -1], -1)
    likeliest = p.argmax(-1)
    share = (own[:, 30].view(50, 3) == likeliest).float().mean(0)
    noise = (p.max(-1).values * (1 - p.max(-1).values) / 50).sqrt()
    assert ((share - p.max(-1).values).abs() < 4 * noise + 0.02).all()
    taken = [on_policy(0.3, 1, step) for step in range(2000)]
    assert np.mean(taken) == pytest.approx(0.3, abs=0.05)
    assert not any(on_policy(0.0, 1, step) for step in range(50))


def test_a_draw_is_the_first_token_whose_cumulative_share_exceeds_it():
    p = np.array([0.2, 0.0, 0.5, 0.0, 0.3])
    with np.errstate(divide="ignore"):
        logits = torch.from_numpy(np.log(p)).expand(6, 5)
    uniform = torch.tensor([[0.0], [0.1999], [0.2001], [0.6999], [0.7001], [1 - 1e-16]], dtype=torch.float64)
    assert drawn(logits, uniform).flatten().tolist() == [0, 0, 2, 2, 4, 4]


def test_what_a_window_is_continued_by_does_not_depend_on_its_company(teacher):
    rows, windows = torch.arange(6 * 33).view(6, 33) % 300, np.array([9, 4, 2, 7, 1, 5])
    whole = continued(teacher.model, rows, 20, "float32", draws(1, 2, windows, 13))
    for part in ([0], [5, 1], [4, 2, 0]):
        alone = continued(teacher.model, rows[part], 20, "float32", draws(1, 2, windows[part], 13))
        assert torch.equal(alone, whole[part])
    assert not np.array_equal(draws(1, 2, windows, 13), draws(1, 3, windows, 13))


def test_on_policy_steps_learn_and_repeat(teacher, tmp_path):
    start = student()
    step = Distill(**FEW, on_policy=0.5, prompt=0.25)
    runs = [step(start, tiny_context(start, tmp_path / str(i), teacher)) for i in range(2)]
    assert equal(weights(runs[0]), weights(runs[1]))
    assert runs[0].notes["heldout_after"] < runs[0].notes["heldout_before"] - 0.2


def test_a_teacher_that_is_not_there_is_told_before_any_work(tmp_path):
    text = write_text(tmp_path / "text", 12)
    variants = {"taught": [{"distill": {"teachers": [{"model": str(tmp_path / "gone")}]}}]}
    recipe = write_recipe(tmp_path / "r.yaml", text, variants=variants)
    assert "variants.taught.distill: " in refused("run", recipe, "-o", tmp_path / "run")


def test_students_are_made_and_taught_through_the_command_line(tmp_path):
    """A narrower student, all of a teacher's guidance, and another taught from targets kept beforehand."""
    few = {"tokens": 512, "batch": 4, "heldout_points": 2}
    recipe = write_recipe(
        tmp_path / "r.yaml",
        write_text(tmp_path / "text", 40),
        variants={
            "narrow": [
                {"student": {"blocks": 1, "intermediate": 64}},
                {"distill": {**few, "hidden": 1.0, "relations": 1.0, "on_policy": 0.5, "average": "ema"}},
            ],
            "offline": [{"prune_gradual": {**few, "targets": "cached", "every": 1, "patience": 4}}],
        },
    )
    outcome = invoke("run", recipe, "-o", tmp_path / "run", "--no-measure")
    assert outcome.code == 0, outcome.err
    names = ("base", "narrow", "offline")
    whole, nonzero = zip(
        *(parameter_counts(Bundle.load(tmp_path / "run" / name).model) for name in names), strict=True
    )
    assert whole[1] < whole[0]
    assert nonzero[2] < 0.7 * whole[2]
