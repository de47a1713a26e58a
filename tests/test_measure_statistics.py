import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.measure.statistics import mean_interval, paired_interval, percentile
from compress.report.verdicts import is_significant


@pytest.mark.parametrize("windows", [12, 40])
def test_interval_covers_the_true_mean_about_95_times_in_100(windows):
    rng = np.random.default_rng(windows)
    counts = np.full(windows, 50)
    trials, hits = 400, 0
    for trial in range(trials):
        sums = 50 * (3.0 + rng.gamma(4.0, 0.25, windows))  # skewed, as losses are; true mean 4
        low, high = mean_interval(sums, counts, seed=trial, draws=1000)
        hits += low <= 4.0 <= high
    assert 0.91 <= hits / trials <= 0.985


def test_pairing_removes_what_windows_share():
    rng = np.random.default_rng(0)
    base = rng.normal(300.0, 40.0, 30)
    variant = base + rng.normal(1.0, 0.5, 30)
    counts = np.full(30, 100)
    low, high = paired_interval(variant, base, counts)
    assert is_significant((low, high))
    assert high - low < 0.01
    wide = mean_interval(variant, counts)
    assert wide[1] - wide[0] > 10 * (high - low)


def test_windows_of_unequal_length_count_by_their_tokens():
    low, high = mean_interval([10.0, 1000.0], [10, 1000], draws=200)
    assert low == pytest.approx(1.0)
    assert high == pytest.approx(1.0)


def test_same_seed_same_interval_and_one_window_none():
    sums, counts = np.linspace(3.0, 5.0, 17) ** 2, np.full(17, 2)
    assert mean_interval(sums, counts, seed=4) == mean_interval(sums, counts, seed=4)
    assert mean_interval(sums, counts, seed=4) != mean_interval(sums, counts, seed=5)
    assert mean_interval([3.0], [2]) is None
    with pytest.raises(ValueError, match="same windows"):
        mean_interval([3.0], [2, 2])


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_interval_is_inside_the_range_of_the_windows(sums):
    low, high = mean_interval(sums, np.ones(len(sums)), draws=300)
    assert min(sums) - 1e-9 <= low <= high <= max(sums) + 1e-9


def test_percentiles_need_samples():
    assert percentile(np.arange(99), 0.99) is None
    assert percentile(np.arange(100), 0.99) is not None
    assert percentile(np.arange(19), 0.95) is None
    assert percentile(np.arange(20), 0.95) is not None
    assert percentile([], 0.5) is None
    assert percentile([1.0, 3.0], 0.5) == 2.0


def test_zero_change_is_not_significant():
    interval = paired_interval([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1, 1, 1])
    assert interval == (0.0, 0.0)
    assert not is_significant(interval)
