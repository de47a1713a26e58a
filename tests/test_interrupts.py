"""Signals end a command once, in order, in one line; what killed processes left is swept up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_helpers import python, write_recipe, write_text

from compress.artifact.sizes import ArtifactBytes
from compress.host.scratch import Scratch, scratch
from compress.measure.process import PARENT
from compress.records.manifest import Lineage, PassRecord
from compress.run.pipeline import make
from compress.run.recipe import load_recipe

# a command in place of the real ones, which tells how far it came; `raise_signal` as a terminal would
SCRIPT = """
import atexit, os, signal, sys, time, weakref
from compress.cli import commands, interrupts
def app():
{app}
commands.app = app
commands.main()
"""
LINE = "interrupted; run the same command again to resume\n"


def ended(folder: Path, app: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command that does this."""
    script = folder / "command.py"
    script.write_text(SCRIPT.format(app="\n".join("    " + line for line in app.splitlines())))
    done = python(script)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_second_signal_does_not_cut_the_tidying_short(number, tmp_path):
    app = f"""
try:
    signal.raise_signal(signal.{number})
    time.sleep(5)
finally:
    signal.raise_signal(signal.{number})
    print("tidied")
"""
    assert ended(tmp_path, app) == (130, "tidied\n", LINE)


def test_a_signal_while_python_ends_changes_nothing(tmp_path):
    app = """
atexit.register(lambda: (signal.raise_signal(signal.SIGTERM), print("libraries ended")))
print("done")
sys.exit(0)
"""
    assert ended(tmp_path, app) == (0, "done\nlibraries ended\n", "")


def test_a_signal_in_a_finalizer_is_not_lost(tmp_path):
    app = """
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000): pass
Finalized()
for _ in range(100): time.sleep(0.05)
print("went on")
"""
    assert ended(tmp_path, app) == (130, "", LINE)


@pytest.mark.parametrize("error", ["ValueError", "commands.UserError", "OSError", "MemoryError"])
def test_what_a_library_makes_of_a_signal_is_no_error_of_its_own(error, tmp_path):
    app = f"""
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(5)
except BaseException:
    raise {error}("could not determine the shape of an object") from None
"""
    assert ended(tmp_path, app) == (130, "", LINE)


def test_what_hangs_while_it_tidies_is_ended_by_a_later_signal(tmp_path):
    app = """
interrupts._TIDYING_SECONDS = 0.1
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(5)
finally:
    time.sleep(0.2)
    signal.raise_signal(signal.SIGINT)
    time.sleep(30)
"""
    begun = time.monotonic()
    assert ended(tmp_path, app) == (130, "", LINE)
    assert time.monotonic() - begun < 20


def test_the_next_scratch_folder_removes_those_of_killed_processes(tmp_path):
    command = f"""
import time
from pathlib import Path
from compress.host.scratch import Scratch
made = Scratch(Path({str(tmp_path)!r}))
(made.path / "large").write_bytes(b"x" * 1000)
print(made.path, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True) as other:
        theirs = Path(other.stdout.readline().strip())
        with scratch(tmp_path) as mine:
            assert mine.is_dir()
            assert theirs.is_dir(), "somebody works in it"
        assert not mine.exists()
        os.kill(other.pid, signal.SIGKILL)
    assert theirs.is_dir()
    made = Scratch(tmp_path)
    assert list(tmp_path.iterdir()) == [made.path.parent]
    made.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_process_was_killed_before_it_locked_it_is_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        pass
    left, begun = (tmp_path / f"compress-scratch-{pid}-x" for pid in (gone.pid, os.getpid()))
    left.mkdir()
    begun.mkdir()
    made = Scratch(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([begun, made.path.parent])


def test_a_link_that_looks_like_a_scratch_folder_is_left_alone(tmp_path):
    precious = tmp_path / "precious"
    (precious / "files").mkdir(parents=True)
    (precious / "lock").touch()
    place = tmp_path / "place"
    place.mkdir()
    (place / "compress-scratch-1").symlink_to(precious)
    Scratch(place).remove()
    assert (precious / "files").is_dir()
    assert (place / "compress-scratch-1").is_symlink()


def test_a_worker_whose_parent_was_gone_before_it_could_look_ends():
    command = [sys.executable, "-m", "compress.measure.worker", "onnxruntime", "1"]
    env = {**os.environ, PARENT: str(os.getppid())}  # anybody but the one who starts it
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env) as worker:
        assert worker.wait(60) == 1


def test_what_a_cut_off_step_left_goes_when_the_run_is_made(tmp_path):
    recipe = load_recipe(str(write_recipe(tmp_path / "tiny.yaml", write_text(tmp_path / "text"))))
    made = make(recipe, tmp_path / "run")
    (step,) = made.steps
    left = tmp_path / "run" / ".work" / step[:16]
    left.mkdir()
    (tmp_path / "run" / ".work" / "measured.json").write_text("{}")
    make(recipe, tmp_path / "run")
    assert not left.exists()
    assert (tmp_path / "run" / ".work" / "measured.json").exists(), "measuring goes on from it"


def test_a_comparison_with_the_stock_model_that_was_cut_off_is_made_again(tmp_path, monkeypatch):
    import compress.run.pipeline as pipeline

    recipe = load_recipe(str(write_recipe(tmp_path / "tiny.yaml", write_text(tmp_path / "text"))))

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    compared = []
    monkeypatch.setattr(pipeline, "null_pass", cut_off)
    with pytest.raises(KeyboardInterrupt):
        make(recipe, tmp_path / "run")
    monkeypatch.setattr(pipeline, "null_pass", lambda *given: compared.append(given))
    make(recipe, tmp_path / "run")
    make(recipe, tmp_path / "run")
    assert len(compared) == 1


def test_a_current_folder_that_was_deleted_is_told_of(tmp_path):
    (tmp_path / "gone").mkdir()
    line = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec {sys.executable} -m compress passes"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the current folder was deleted; change to one that exists\n"


def test_how_large_an_artifact_gets_does_not_depend_on_how_long_its_steps_took(bundle, tmp_path):
    def weighed(seconds: float, speed: float, peak: int | None) -> int:
        record = PassRecord(
            name="train", config={}, seconds=seconds, peak_rss_bytes=peak, parent=None, fingerprint="f",
            seed=0, notes={"tokens_per_second": speed},
        )  # fmt: skip
        made = bundle.evolve(lineage=Lineage(source="here", steps=(record,)))
        return ArtifactBytes(made, [], 0, tmp_path / "scratch").rest

    assert weighed(1.0, 2.0, None) == weighed(0.123456789012345, 12345.6, 10**10)
