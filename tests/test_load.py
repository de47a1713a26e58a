"""Other programs on our cores: seen, told, and never a reason to wait without end."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import invoke
from export_models import SPINNING, exported, session_entry, tiny_bundle

from compress.host import load
from compress.host.load import Load
from compress.measure import latency, turns
from compress.measure.process import WAIT_POLICY
from compress.measure.turns import Target, Workers
from compress.measure.worker import Worker
from compress.records.protocol import MeasureProtocol

# a worker that answers each command with how its threads were told to wait
TELLER = f"""
import json, os, sys
for line in sys.stdin:
    print(json.dumps({{"ok": {{"policy": os.environ.get("{WAIT_POLICY}")}}}}), flush=True)
"""


def counted(monkeypatch, seconds: list[float], own: list[float], clock: list[float]) -> None:
    """A system of two cores, which count so many busy seconds each time they are asked."""
    monkeypatch.setattr(load, "_busy_seconds", lambda: dict.fromkeys((0, 1), seconds.pop(0) / 2))
    monkeypatch.setattr(Load, "_own_seconds", lambda self: own.pop(0))
    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: clock.pop(0), sleep=lambda s: None))


def test_what_others_had_is_what_was_busy_without_our_own(monkeypatch):
    counted(monkeypatch, seconds=[100.0, 116.0], own=[7.0, 13.0], clock=[0.0, 10.0])
    assert Load().others() == pytest.approx((16 - 6) / (10 * 2))


def test_what_the_system_does_not_count_is_not_known(monkeypatch):
    monkeypatch.setattr(load, "_busy_seconds", lambda: None)
    assert Load().others() is None
    assert not load.crowded()


def test_our_own_work_and_that_of_our_processes_is_not_others(monkeypatch):
    script = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", script]) as child:
        time.sleep(0.3)
        alone, with_child = Load(), Load([child.pid])
        time.sleep(0.6)
        # whatever else runs here, the child's share is in one of them and not in the other
        difference = (alone.others() or 0.0) - (with_child.others() or 0.0)
        child.kill()
    assert difference > 0.1 / (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("others", "policy", "said"), [(1.9, "PASSIVE", "sleeping"), (0.0, None, "spinning")]
)
def test_beside_others_workers_sleep_while_they_wait(others, policy, said, monkeypatch, tmp_path):
    """From what the system counts to the environment of the process that is timed."""
    counted(monkeypatch, seconds=[0.0, 10.0 * others], own=[0.0, 0.0], clock=[0.0, 10.0])
    monkeypatch.setenv(WAIT_POLICY, "ACTIVE")  # that of the parent, which trains
    command = (sys.executable, "-I", "-S", "-c", TELLER)
    monkeypatch.setattr("compress.measure.process.own_worker", lambda: command)
    target = Target("a", "torch", tmp_path)
    with ExitStack() as stack:
        workers = Workers(MeasureProtocol(), SimpleNamespace(folder=tmp_path), None, stack)
        assert workers.loaded(target)[1] == {"policy": policy}
    assert [timing.waiting for timing in workers._timings([target], together=True).values()] == [said]


def test_a_worker_that_sleeps_tells_onnx_runtime(monkeypatch, tmp_path):
    exported(tiny_bundle("llama"), tmp_path)
    worker, found = Worker("onnxruntime", 1, lambda: None), []
    for policy in ("PASSIVE", "ACTIVE", ""):
        monkeypatch.setenv(WAIT_POLICY, policy)
        worker.load(str(tmp_path))
        found.append(session_entry(worker.loaded, SPINNING))
    assert found == ["0", None, None]


def test_a_command_s_own_threads_sleep_unless_somebody_says_otherwise(monkeypatch):
    for given, policy in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setenv(WAIT_POLICY, "")
        monkeypatch.delenv(WAIT_POLICY) if given is None else monkeypatch.setenv(WAIT_POLICY, given)
        assert invoke("--version").code == 0
        assert os.environ[WAIT_POLICY] == policy


def test_the_bar_counts_a_round_as_tokens_of_a_prompt():
    """15 prefills and a rehearsal of 16 tokens; 50 decodes and 3 that warm up, each as 20 tokens; 3 rows."""
    protocol = MeasureProtocol(prefill_tokens=16, rounds=2, batch=3)
    assert turns.round_tokens(protocol) == 3 * (16 * 16 + 53 * 20) == 3948


class Slow:
    """A runtime whose every call takes ten milliseconds of its clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def prefill(self, tokens):
        self.now += 0.01
        return "state"

    def decode(self, state, tokens):
        self.now += 0.01
        return state


@pytest.mark.parametrize(
    ("seconds", "prefills", "decodes"), [(0.0, 1, 1), (0.095, 4, 2), (0.305, 15, 12), (10.0, 30, 100)]
)
def test_a_turn_keeps_to_its_seconds_and_has_one_of_each_at_least(monkeypatch, seconds, prefills, decodes):
    runtime = Slow()
    monkeypatch.setattr(latency, "perf_counter", lambda: runtime.now)
    prompt, following = np.zeros((1, 4), np.int32), np.zeros((1, 103), np.int32)
    samples = latency.time_round(runtime, prompt, following, 30, 3, seconds=seconds)
    assert (len(samples.prefill), len(samples.decode)) == (prefills, decodes)


@pytest.mark.parametrize(("seconds", "rounds"), [(1000.0, 5), (40.0, 4), (15.0, 1), (1.0, 1)])
def test_rounds_end_with_the_budget_and_are_whole(monkeypatch, seconds, rounds):
    """Two targets whose turns take five seconds each."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: clock.now))
    run = turns.Workers.__new__(turns.Workers)
    run.protocol = MeasureProtocol(timing_seconds=seconds)
    run.bar = SimpleNamespace(advance=lambda *a, **told: None)
    taken = []
    for target, share in run._turns(["a", "b"]):
        taken.append(target)
        assert share <= max(seconds, 1.0)
        clock.now += 5.0
    assert len(taken) == 2 * rounds
    assert taken.count("a") == taken.count("b")
