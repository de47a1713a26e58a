"""Other programs on our cores: seen, told, and never a reason to wait without end."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from compress.host import load
from compress.host.load import Load
from compress.measure import latency, turns
from compress.measure.process import WAIT_POLICY, _environment
from compress.records.protocol import MeasureProtocol


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


def test_beside_others_workers_sleep_while_they_wait():
    assert _environment(2, sleeping=True)[WAIT_POLICY] == "PASSIVE"
    assert WAIT_POLICY not in _environment(2, sleeping=False)


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
