"""Two processes train as one does: DDP, FSDP2, and the whole command, on this machine with gloo."""

import json
import math
import subprocess

import distributed_driver
import pytest
import torch
from cli_helpers import ROOT, python, write_recipe, write_text
from safetensors.torch import load_file

from compress.cli import commands as cli
from compress.errors import UserError
from compress.passes.train import Train
from compress.run import pipeline
from compress.run.pipeline import join, make
from compress.run.recipe import load_recipe
from compress.run.store import StepStore

TWO = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process and what two make of the same runs."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "false")  # which the driver changes
        distributed_driver.train(one)
    driver = (*TWO, ROOT / "tests" / "distributed_driver.py", two)
    try:
        done = python(*driver, path=ROOT / "tests")
    except subprocess.TimeoutExpired:  # seen once: two groups of processes that start at a time may not meet
        done = python(*driver, path=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return one, two


def _table(curve):
    return torch.tensor([[math.nan if value is None else value for value in point] for point in curve])


@pytest.mark.parametrize("name", list(distributed_driver.RUNS))
def test_two_processes_have_the_loss_curve_of_one(name, folders):
    notes = [json.loads((folder / f"{name}.json").read_text()) for folder in folders]
    assert [n["processes"] for n in notes] == [1, 2]
    assert notes[0]["steps"] == notes[1]["steps"] == 8
    for curve in ("loss_curve", "average_curve"):
        one, two = (
            torch.tensor([[math.nan if v is None else v for v in p] for p in n[curve]]) for n in notes
        )
        # in bfloat16 sums that differ by a float32 rounding end as weights that round to other numbers
        near = 2e-3 if "bfloat16" in name else 1e-4
        torch.testing.assert_close(one, two, rtol=1e-4, atol=near, equal_nan=True)
    if "bfloat16" in name:
        return  # Muon takes each of them another way
    one, two = (load_file(folder / f"{name}.safetensors") for folder in folders)
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=2e-3)
        assert torch.equal(value == 0, two[key] == 0), "the same weights are pruned"


def test_the_same_command_runs_on_two_processes(tmp_path):
    """Artifacts, records and lines come from the main process; passes that do not train run once."""
    training = {"tokens": 1024, "batch": 4, "heldout_points": 2}
    text = write_text(tmp_path / "text", 40)
    base = [{"train": training}, "prune_magnitude"]
    recipe = write_recipe(tmp_path / "tiny.yaml", text, base=base)
    (tmp_path / "alone").mkdir()
    steps = make(load_recipe(str(recipe)), tmp_path / "alone").variants[0].steps
    done = python(*TWO, "-m", "compress", "run", recipe, "-o", tmp_path / "two", "--no-measure")
    assert done.returncode == 0, done.stderr
    told = [line.split(":")[0] for line in done.stderr.splitlines() if line.startswith(("base ", "create "))]
    assert told == ["create created here", "base 1/2 train", "base 2/2 prune_magnitude"]
    assert done.stdout.count("not measured: ") == 1
    assert not list((tmp_path / "two").rglob("*.partial"))
    manifest = json.loads((tmp_path / "two" / "base" / "manifest.json").read_text())
    found = manifest["lineage"]["steps"]
    assert [step["fingerprint"] for step in found] == [step.fingerprint for step in steps]
    curves = [[point[2] for point in notes["loss_curve"]] for notes in (found[1]["notes"], steps[1].notes)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)
    assert (found[1]["notes"]["processes"], steps[1].notes["processes"]) == (2, 1)


def test_the_others_wait_until_the_main_process_has_compared_the_model(tmp_path, monkeypatch):
    """It lies whole in the folder before that; one that read and kept it too would race the main one."""
    text = write_text(tmp_path / "text", 40)
    recipe = load_recipe(str(write_recipe(tmp_path / "tiny.yaml", text, base=["prune_magnitude"])))
    folder = tmp_path / "run"
    folder.mkdir()
    steps = make(recipe, folder).variants[0].steps
    unchecked = folder / ".work" / f"{steps[0].fingerprint[:16]}.unchecked"
    unchecked.touch()
    waited = []

    def wait(until):
        waited.append(until())
        unchecked.unlink(missing_ok=True)
        assert until()

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(pipeline, "wait", wait)
    monkeypatch.setattr(StepStore, "save", lambda *given: pytest.fail("only the main process writes"))
    join(recipe, folder)
    assert waited == [False]


def test_a_mistake_is_told_by_the_main_process_only(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_HEADSTART_SECONDS", 0)
    for rank, told in (("1", ""), ("0", "error: x\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            cli._fail("error: x", 2)
        assert end.value.code == 2
        assert capsys.readouterr().err == told


def test_a_batch_that_cannot_be_dealt_out_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="8 windows per step .* cannot be dealt out to 3 processes"):
        Train().layers(torch.nn.Linear(1, 1))
