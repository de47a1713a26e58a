"""A few cases of the campaign's kills, full disks and surroundings; `python -m tests.campaign` has all."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `campaign` is a package here

from campaign import core, disks, kills, runs, surroundings


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    work = tmp_path_factory.mktemp("campaign")
    with runs.forking(work) as forks:
        yield kills.Stage(work, forks)


def test_runs_that_were_killed_end_with_the_same_bytes(stage):
    kind = stage.ground.kinds["streamed"]
    for number in range(2):
        source = random.Random(f"sample {number}")
        outcome = kills.killed(stage, source, f"sample {number}", kind, shells=[False])
        assert not outcome.bad, outcome


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(stage):
    source = random.Random("sample")
    kind = stage.ground.kinds["streamed"]
    outcome = disks.full(stage, source, "sample", mounts=False, kind=kind)
    assert not outcome.bad, outcome


@pytest.mark.parametrize("name", ["folder vanishes", "clock jumps"])
def test_surroundings(stage, name):
    scene = surroundings.Scene(stage, None, random.Random("sample"), stage.ground.kinds["streamed"])
    assert not surroundings.met(scene, name, "sample").bad


def test_what_differs_is_found(stage, tmp_path):
    kind = stage.ground.kinds["streamed"]
    stage.whole(kind)
    case = stage.fresh()
    assert stage.forks.start(kind.command(case), case)
    status = runs.finish(stage.forks)
    assert stage.judged(kind, status, "t", "a") == core.Outcome("t", "resumed")
    (case / "tmp" / "compress-left").touch()
    assert stage.judged(kind, status, "t", "a").verdict == "left behind"
    weights = next(case.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert stage.judged(kind, status, "t", "a").verdict == "other bytes"
    (case / "err").write_text("Traceback (most recent call last):\n")
    assert stage.judged(kind, status, "t", "a").verdict == "traceback"
    assert stage.judged(kind, 3, "t", "a").bad
