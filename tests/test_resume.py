"""Ctrl-C, SIGKILL and a full disk in the middle of every kind of step; the same bytes after going on."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import ROOT, invoke, write_recipe, write_text

from compress.errors import UserError
from compress.measure import process
from compress.measure.quality import score
from compress.run.store import earlier_seconds

TRAINING = {"tokens": 1500, "batch": 4, "heldout_points": 2, "checkpoint_seconds": 0}
KILLS = ("SIGKILL", "SIGINT")
# where to stop: a function inside each kind of step, the call of it, and how; in the order of the run
STOPS = [
    (
        "compress.training.loop._check_finite",
        3,
        ("full", *KILLS),
    ),  # the loss itself is known by identity
    ("compress.export.onnx.artifact.write_artifact", 1, ("full",)),
    ("compress.export.onnx.check.compare", 1, KILLS),  # the graph is written, not yet checked
    ("compress.run.store.link_or_copy", 2, KILLS),  # the step is being kept, or shown as the variant
    ("compress.solvers.masks.smallest", 3, ("full", *KILLS)),
    ("compress.artifact.bundle.file_record", 2, KILLS),  # the weights are written, the manifest is not
    ("compress.training.teaching.distillation.distillation", 3, ("full", *KILLS)),
    ("compress.layerwise.quantize.gptq", 3, ("full", *KILLS)),
    ("compress.artifact.shards.save_file", 2, ("full", "SIGKILL")),  # one block is written, the next is not
]
STATUS = {"full": 2, "SIGKILL": -9, "SIGINT": 130}


def weights(run: Path) -> dict[str, str]:
    """The digest of every weight file of every variant."""
    files = [p for p in run.glob("[!.]*/**/*") if ".safetensors" in p.name or ".onnx" in p.name]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def driver():
    """`cli_driver.py`, of which importing takes most of the time."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, str(ROOT / "tests" / "cli_driver.py")]
    with subprocess.Popen(command, env={**os.environ, **fixed}, **pipes) as process:
        yield process


def drive(driver, jobs: list[dict[str, object]]) -> list[dict[str, object]]:
    """Let the driver run the jobs, one after the other."""
    told = []
    for job in jobs:
        driver.stdin.write(json.dumps(job) + "\n")
        driver.stdin.flush()
        told.append(json.loads(driver.stdout.readline()))
    return told


def check(job: dict[str, object], told: dict[str, object]) -> None:
    """That a job ended as it should: in one line, except for a kill, and with no process left."""
    lines = str(told["err"]).splitlines()
    assert told["status"] == STATUS.get(str(job.get("action")), 0), (job, told)
    assert told["outlived"] == [], (job, told)
    if job.get("action") == "full":
        assert lines[-1].startswith("error: "), (job, told)
        assert "Traceback" not in str(told["err"]), (job, told)
    elif job.get("action") == "SIGINT":
        assert lines[-1] == "interrupted; run the same command again to resume"


def test_every_kind_of_step_resumes_to_the_same_bytes(tmp_path, driver):
    recipe = write_recipe(
        tmp_path / "tiny.yaml",
        write_text(tmp_path / "text"),
        base=[{"train": TRAINING}, {"export_onnx": {"check_tokens": 64}}],
        variants={
            "small": [
                "prune_magnitude",
                {"distill": TRAINING},
                "quantize_gptq",
                {"export_onnx": {"check_tokens": 64}},
            ],
            "streamed": ["quantize_round"],
        },
    )
    jobs: list[dict[str, object]] = [
        {"arguments": ["run", str(recipe), "-o", str(tmp_path / name), "--no-measure"]}
        for name in ("whole", "stopped")
    ]
    straight, again = jobs
    stops = [
        {**again, "place": place, "call": call, "action": action}
        for place, call, actions in STOPS
        for action in actions
    ]
    plan = [straight, *stops, again]
    for job, told in zip(plan, drive(driver, plan), strict=True):
        check(job, told)
    expected = weights(tmp_path / "whole")
    assert {"base/model.safetensors", "base/onnx/model.onnx", "small/quantized.safetensors"} <= set(expected)
    assert weights(tmp_path / "stopped") == expected
    assert not list((tmp_path / "stopped").rglob("*.partial"))


def test_another_interval_between_checkpoints_goes_on_from_the_one_there_is(tmp_path, driver):
    text, place = write_text(tmp_path / "text"), "compress.training.objectives.base.cross_entropy"
    jobs: list[dict[str, object]] = []
    for name, interval in (("a", 0), ("b", 50)):
        base = [{"train": {**TRAINING, "checkpoint_seconds": interval}}]
        recipe = write_recipe(tmp_path / f"{name}.yaml", text, base=base)
        jobs.append({"arguments": ["run", str(recipe), "-o", str(tmp_path / "run"), "--no-measure"]})
    killed = {**jobs[0], "place": place, "call": 10, "action": "SIGKILL"}
    # from the start it would come to that call again
    going_on = {**jobs[1], "place": place, "call": 10, "action": "SIGKILL"}
    for job, told in zip([killed, going_on], drive(driver, [killed, going_on]), strict=True):
        check({**job, **({"action": None} if job is going_on else {})}, told)
    (step,) = json.loads((tmp_path / "run" / "base" / "manifest.json").read_text())["lineage"]["steps"][1:]
    assert step["config"]["checkpoint_seconds"] == 50


def test_measuring_comes_later_if_asked_and_goes_on_after_a_stop(tmp_path, driver):
    recipe = write_recipe(tmp_path / "tiny.yaml", write_text(tmp_path / "text"))
    run = tmp_path / "run"
    made = invoke("run", recipe, "-o", run, "--no-measure")
    assert made.code == 0, made.err
    assert made.out.splitlines()[0] == str(run / "base")
    assert (run / "base" / "manifest.json").is_file()
    assert not (run / "results.jsonl").exists()
    command: dict[str, object] = {"arguments": ["run", str(recipe), "-o", str(run)]}
    forked = {**command, "worker": process.own_worker()}  # the first has workers as users have them
    plan = [
        {**command, "place": "compress.measure.process.WorkerProcess.ask", "call": 1, "action": "SIGKILL"},
        {**forked, "place": "compress.measure.harness.save_result", "call": 1, "action": "SIGINT"},
        forked,
    ]
    for job, told in zip(plan, drive(driver, plan), strict=True):
        check(job, told)
    assert len((run / "results.jsonl").read_text().splitlines()) == 1
    assert (run / "report.html").exists()
    assert not any((run / ".work").iterdir()), "what the killed run left is swept up"


def test_a_disk_that_fills_while_the_base_is_scored(tmp_path):
    windows = np.zeros((2, 8), np.int32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="logits cannot be written .* free some space"):
            score(lambda tokens: np.zeros((*tokens.shape, 5000), np.float32), windows, keep=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_seconds_of_runs_that_were_cut_off_are_counted(tmp_path):
    assert earlier_seconds(tmp_path) == 0
    began = float((tmp_path / "started").read_text().split()[1])
    checkpoint = tmp_path / "deep" / "checkpoint"
    checkpoint.parent.mkdir()
    checkpoint.write_text("")
    os.utime(checkpoint, (began + 40, began + 40))
    assert earlier_seconds(tmp_path) == pytest.approx(40, abs=0.01)
    again = float((tmp_path / "started").read_text().split()[1])
    os.utime(checkpoint, (again + 5, again + 5))
    assert earlier_seconds(tmp_path) == pytest.approx(45, abs=0.01)
