"""The loop: it learns, resumes to the same bytes after a kill, respects masks, changes nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_set import WINDOW, equal, tiny_bundle, tiny_context, weights

from compress.errors import UserError
from compress.models.running import heldout_nll
from compress.passes.distill import Distill
from compress.passes.train import Train
from compress.training import checkpoint
from compress.training.batches import Batches

SETTINGS = {"tokens": 48 * 4 * WINDOW, "batch": 4, "heldout_points": 3}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls_and_the_notes_tell(optimizer, tmp_path):
    bundle = tiny_bundle()
    before = weights(bundle)
    result = Train(**SETTINGS, optimizer=optimizer)(bundle, tiny_context(bundle, tmp_path))
    notes = result.notes
    assert notes["heldout_before"] == pytest.approx(np.log(300), rel=0.05)
    assert notes["heldout_after"] < notes["heldout_before"] - 1
    assert (notes["tokens"], notes["steps"]) == (48 * 4 * WINDOW, 48)
    assert notes["tokens_per_parameter"] == pytest.approx(notes["tokens"] / notes["parameters"], rel=0.01)
    curve = notes["loss_curve"]
    assert curve[-1][:2] == [48, notes["tokens"]]
    assert [point[0] for point in curve if point[3] is not None] == [16, 32, 48]
    assert equal(before, weights(bundle)), "a pass leaves its input as it was"
    assert not result.model.training


def test_same_seed_same_weights_and_another_seed_others(tmp_path):
    bundle = tiny_bundle()
    runs = [
        Train(**SETTINGS)(bundle, tiny_context(bundle, tmp_path / str(i), seed=s))
        for i, s in enumerate((1, 1, 2))
    ]
    assert equal(weights(runs[0]), weights(runs[1]))
    assert not equal(weights(runs[0]), weights(runs[2]))


def test_micro_batches_add_up_to_the_batch(tmp_path):
    bundle = tiny_bundle()
    settings = {"tokens": 10 * 4 * WINDOW, "optimizer": "adamw", "learning_rate": 1e-3}
    whole = Train(**settings, batch=4)(bundle, tiny_context(bundle, tmp_path / "a"))
    parts = Train(**settings, batch=1, accumulate=4)(bundle, tiny_context(bundle, tmp_path / "b"))
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_masked_weights_stay_exactly_zero(optimizer, tmp_path):
    bundle = tiny_bundle()
    name = "model.layers.1.mlp.up_proj"
    mask = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) > 0.5
    pruned = bundle.evolve(masks={name: mask})
    for step in (Train(**SETTINGS, optimizer=optimizer), Distill(**SETTINGS, optimizer=optimizer)):
        result = step(pruned, tiny_context(bundle, tmp_path / step.kind))
        weight = result.model.get_submodule(name).weight
        assert torch.equal(weight != 0, mask)
        assert not torch.equal(weight[mask], bundle.model.get_submodule(name).weight[mask])
        assert torch.equal(result.masks[name], mask)


# imports once; then a process for each line it reads: trains in a folder, keeps the weights in a file
_FORKS = """
import json, os, sys
from pathlib import Path
from safetensors.torch import save_file
from training_set import tiny_bundle, tiny_context
import torch
torch.set_num_threads(1)
from compress.passes.train import Train
for line in sys.stdin:
    folder, target = json.loads(line)
    child = os.fork()
    if child == 0:
        bundle = tiny_bundle()
        step = Train(tokens=120 * 4 * 32, batch=4, heldout_points=5, checkpoint_seconds=0.0)
        result = step(bundle, tiny_context(bundle, Path(folder)))
        save_file({k: v.clone() for k, v in result.model.state_dict().items()}, target)
        Path(target + ".curve").write_text(repr(result.notes["loss_curve"]))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_for_real_it_ends_with_the_same_bytes(tmp_path):
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def begin(name):
        forks.stdin.write(json.dumps([str(tmp_path / name), str(tmp_path / f"{name}.safetensors")]) + "\n")
        forks.stdin.flush()
        return int(forks.stdout.readline())

    with subprocess.Popen([sys.executable, "-c", _FORKS], env=environment, **pipes) as forks:
        begin("whole")
        assert int(forks.stdout.readline()) == 0
        child = begin("killed")
        while not (tmp_path / "killed" / "training.safetensors").exists():
            time.sleep(0.01)
        time.sleep(0.1)  # some steps further, perhaps in the middle of writing a checkpoint
        os.kill(child, signal.SIGKILL)
        assert int(forks.stdout.readline()) == -signal.SIGKILL
        begin("killed")
        assert int(forks.stdout.readline()) == 0
    whole, killed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert equal(whole, killed)
    curves = [(tmp_path / f"{run}.safetensors.curve").read_text() for run in ("whole", "killed")]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("step", [Train, Distill])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupted_around_a_checkpoint_it_ends_with_the_same_bytes(
    step, optimizer, moment, tmp_path, monkeypatch, capsys
):
    bundle, teacher = tiny_bundle(), tiny_bundle(seed=3)
    mask = {
        "model.layers.0.mlp.up_proj": torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) > 0.5
    }
    bundle = bundle.evolve(masks=mask)
    run = step(tokens=20 * 4 * WINDOW, batch=4, checkpoint_seconds=0.0, optimizer=optimizer)
    whole = run(bundle, tiny_context(bundle, tmp_path / "whole", teacher))
    assert "goes on" not in capsys.readouterr().err
    save, calls = checkpoint.save, []

    def interrupted(*arguments):
        calls.append(arguments[3]["step"])
        if moment == "after":
            save(*arguments)
        if len(calls) % 6 == 0:
            raise KeyboardInterrupt
        if moment == "before":
            save(*arguments)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    lives = 0
    while True:
        lives += 1
        try:
            result = run(bundle, tiny_context(bundle, tmp_path / "cut", teacher))
            break
        except KeyboardInterrupt:
            continue
    assert lives >= 3
    assert capsys.readouterr().err.count("goes on after step") == lives - 1
    assert equal(weights(whole), weights(result))
    assert whole.notes["loss_curve"] == result.notes["loss_curve"]


def test_masks_hold_in_layers_that_are_stored_transposed(tmp_path):
    bundle = tiny_bundle(family="gpt2")
    name = "transformer.h.0.mlp.c_fc"
    mask = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) > 0.5
    result = Train(**SETTINGS)(bundle.evolve(masks={name: mask}), tiny_context(bundle, tmp_path))
    assert torch.equal(result.model.get_submodule(name).weight != 0, mask)


def test_a_checkpoint_of_another_run_or_a_torn_one_is_ignored(tmp_path):
    bundle = tiny_bundle()
    context = tiny_context(bundle, tmp_path)
    fresh = Train(**SETTINGS)(bundle, tiny_context(bundle, tmp_path / "fresh"))
    Train(**SETTINGS, checkpoint_seconds=0.0, learning_rate=1e-4)(bundle, context)
    assert (tmp_path / "training.safetensors").exists()
    assert equal(weights(fresh), weights(Train(**SETTINGS)(bundle, context)))
    (tmp_path / "training.safetensors").write_bytes(b"torn")
    assert equal(weights(fresh), weights(Train(**SETTINGS)(bundle, context)))


def test_checkpoints_hold_every_number_exactly(tmp_path):
    models = [tiny_bundle(seed).model for seed in (0, 1)]
    optimisers = [[torch.optim.AdamW(model.parameters(), fused=True)] for model in models]
    for parameter in models[0].parameters():
        parameter.grad = torch.randn_like(parameter)
    optimisers[0][0].step()
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, models[0], optimisers[0], {"identity": "x", "step": 1, "sum": 0.1})
    assert checkpoint.restore(path, models[1], optimisers[1], "y") is None
    assert checkpoint.restore(path, models[1], optimisers[1], "x") == {"identity": "x", "step": 1, "sum": 0.1}
    assert checkpoint.digest(models[0]) == checkpoint.digest(models[1])
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        for key, value in optimisers[0][0].state[left].items():
            assert torch.equal(value, optimisers[1][0].state[right][key])


def test_a_damaged_checkpoint_is_ignored_and_changes_nothing(tmp_path):
    model, path = tiny_bundle().model, tmp_path / "c.safetensors"
    checkpoint.save(path, model, [], {"identity": "x", "step": 1})
    whole, before = path.read_bytes(), checkpoint.digest(model)
    renamed = whole.replace(b"model.lm_head", b"model.lm_heed").replace(b"model.norm", b"model.morn", 1)
    for damaged in (
        whole[:-1] + bytes([whole[-1] ^ 1]),
        whole.replace(b'\\"step\\": 1', b'\\"step\\": 2'),
        renamed,
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        assert checkpoint.restore(path, model, [], "x") is None
        assert checkpoint.digest(model) == before
    path.write_bytes(whole)
    assert checkpoint.restore(path, model, [], "x") == {"identity": "x", "step": 1}


def test_a_full_disk_is_told_in_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    model, path = tiny_bundle().model, tmp_path / "c.safetensors"
    checkpoint.save(path, model, [], {"identity": "x"})

    def full(tensors, target, metadata):
        target.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(path, model, [], {"identity": "y"})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert checkpoint.restore(path, model, [], "x") == {"identity": "x"}


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    stream = np.arange(10 * 8 + 8, dtype=np.int32)
    batches = Batches(stream, window=8, batch=5, seed=0)
    assert batches.windows == 10
    epochs = [np.concatenate([batches(2 * e), batches(2 * e + 1)]) for e in range(2)]
    for rows in epochs:
        assert rows.shape == (10, 9)
        offset = rows[:, 0].min()
        assert sorted(rows[:, 0] - offset) == [8 * i for i in range(10)]
        assert (np.diff(rows) == 1).all()
    assert not np.array_equal(epochs[0] // 8, epochs[1] // 8)
    assert np.array_equal(batches(7), Batches(stream, 8, 5, 0)(7)), "a pure function of seed and step"


@pytest.mark.parametrize(("batch", "parts", "count"), [(12, 1, 1), (12, 5, 1), (10, 2, 2), (6, 6, 3)])
def test_micro_batches_of_all_processes_are_the_step(batch, parts, count):
    batches = Batches(np.arange(40 * 8 + 8, dtype=np.int32), window=8, batch=batch, seed=0)
    rows, numbers = [], []
    for rank in range(count):
        dealt = list(batches.micro_batches(3, parts, rank, count))
        sizes = [len(part.rows) for part in dealt]
        assert len(dealt) <= parts
        assert len(set(sizes[:-1])) <= 1, "equal but for the last"
        assert sizes[-1] <= sizes[0]
        # so the sum over all processes of means times shares is the mean over the step's windows
        assert [part.share for part in dealt] == pytest.approx([size / batch for size in sizes])
        assert [part.last for part in dealt] == [False] * (len(dealt) - 1) + [True]
        rows += [row.tolist() for part in dealt for row in part.rows]
        numbers += [int(number) for part in dealt for number in part.numbers]
    assert sorted(rows) == sorted(batches(3).tolist())
    assert sorted(numbers) == sorted(batches.numbers(3).tolist())


def test_text_shorter_than_a_batch_is_an_error(tmp_path):
    bundle = tiny_bundle()
    with pytest.raises(UserError, match="1000 windows of 32 tokens need 32032 tokens"):
        Train(tokens=1000, batch=1000)(bundle, tiny_context(bundle, tmp_path))


def test_windows_beyond_the_models_positions_are_refused_beforehand(tmp_path):
    bundle, short = tiny_bundle(family="gpt2"), tiny_bundle(family="gpt2", context=16)
    with pytest.raises(UserError, match="window: 128 tokens, but the model takes at most 64"):
        Train(window=128).layers(bundle.model)
    with pytest.raises(
        UserError, match=r"distill.window: 32 tokens, but the teacher 'tiny' takes at most 16"
    ):
        Distill(tokens=64, batch=1)(bundle, tiny_context(bundle, tmp_path, short))


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    bundle = tiny_bundle()
    with torch.no_grad():
        bundle.model.get_input_embeddings().weight[:] = torch.inf
    with pytest.raises(UserError, match="training: the loss is not finite after step 1; lower the learning"):
        Train(**SETTINGS)(bundle, tiny_context(bundle, tmp_path))


def test_tokens_beyond_the_text_wrap_and_say_so(tmp_path):
    bundle = tiny_bundle()
    context = tiny_context(bundle, tmp_path)
    context.data.train.setflags(write=False)
    notes = Train(tokens=len(context.data.train) * 2, batch=16)(bundle, context).notes
    assert 1.9 < notes["epochs"] < 2.2


def test_torchs_random_state_and_the_attention_are_left_as_they_were(tmp_path):
    bundle = tiny_bundle()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    result = Train(**SETTINGS)(bundle, tiny_context(bundle, tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert result.model.config._attn_implementation == bundle.model.config._attn_implementation == "sdpa"
    assert set(result.model.__dict__) == set(bundle.model.__dict__)


def test_bfloat16_forward_keeps_float32_weights_and_learns(tmp_path):
    bundle = tiny_bundle()
    context = tiny_context(bundle, tmp_path)
    context.precision = "bfloat16"
    result = Train(**SETTINGS)(bundle, context)
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert result.notes["heldout_after"] < result.notes["heldout_before"] - 1


@pytest.mark.parametrize("step", [Train, Distill])
def test_a_recipe_that_names_its_precision_gives_the_same_weights_on_every_machine(step, tmp_path):
    bundle, made, few = tiny_bundle(), {}, {**SETTINGS, "tokens": 6 * 4 * WINDOW}
    for asked in ("auto", "float32", "bfloat16"):
        for machine in ("float32", "bfloat16"):
            context = tiny_context(bundle, tmp_path / asked / machine, tiny_bundle(seed=3))
            context.precision = machine
            result = made[asked, machine] = step(**few, precision=asked)(bundle, context)
            assert result.notes["precision"] == (machine if asked == "auto" else asked)
    for used in ("float32", "bfloat16"):
        expected = weights(made["auto", used])
        assert all(equal(expected, weights(made[used, machine])) for machine in ("float32", "bfloat16"))
    assert not equal(weights(made["auto", "float32"]), weights(made["auto", "bfloat16"]))


@pytest.mark.parametrize(
    ("changes", "machine", "goes_on"),
    [
        ({"checkpoint_seconds": 1e6}, "float32", True),
        ({"precision": "float32"}, "bfloat16", True),  # what auto was where the checkpoint was written
        ({}, "bfloat16", False),
        ({"precision": "bfloat16"}, "float32", False),
        ({"clip": 0.5}, "float32", False),
    ],
)
def test_a_checkpoint_serves_what_gives_the_same_result(changes, machine, goes_on, tmp_path, capsys):
    bundle = tiny_bundle()
    settings = {"tokens": 4 * 4 * WINDOW, "batch": 4, "checkpoint_seconds": 0.0}
    Train(**settings)(bundle, tiny_context(bundle, tmp_path))
    assert "goes on" not in capsys.readouterr().err
    context = tiny_context(bundle, tmp_path)
    context.precision = machine
    Train(**settings | changes)(bundle, context)
    assert ("goes on after step 3 of 4" in capsys.readouterr().err) == goes_on


def test_trackers_and_checkpoints_decide_nothing():
    plan = Train(trackers=("tensorboard",), checkpoint_seconds=1.0)
    assert plan.deciding("float32") == Train().deciding("float32") != Train().deciding("bfloat16")


def test_a_large_vocabulary_is_scored_in_smaller_pieces_with_the_same_result(monkeypatch):
    model = tiny_bundle().model
    windows = torch.randint(
        0, model.config.vocab_size, (6, WINDOW), generator=torch.Generator().manual_seed(0)
    )
    sizes = []
    model.register_forward_hook(lambda module, given, answer: sizes.append(answer.logits.numel()))
    expected = heldout_nll(model, windows, "float32")
    whole = sizes.pop()
    assert not sizes
    monkeypatch.setattr("compress.models.running._HELDOUT_LOGITS", whole // 2)
    assert heldout_nll(model, windows, "float32") == pytest.approx(expected, rel=1e-6)
    assert sizes == [whole // 2] * 2
    monkeypatch.setattr("compress.models.running._HELDOUT_LOGITS", 1)
    assert heldout_nll(model, windows, "float32") == pytest.approx(expected, rel=1e-6)
    assert sizes[2:] == [whole // 6] * 6
