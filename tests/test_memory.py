"""What becomes of memory that a process no longer needs."""

import platform

import numpy as np
import psutil
import pytest

from compress.host.memory import kept_for_reuse, returned_at_once, trim

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's rules are asked for")
MEGABYTES = 96


def grown(arrays):
    """MB by which the process has grown when so many arrays, one after the other, have come and gone."""
    process = psutil.Process()
    trim()
    before = process.memory_info().rss
    for _ in range(arrays):
        np.ones(MEGABYTES << 20, dtype=np.uint8)
    return (process.memory_info().rss - before) >> 20


def test_freed_memory_is_kept_and_used_again_until_the_block_ends():
    process = psutil.Process()
    start = process.memory_info().rss
    with kept_for_reuse():
        assert 0.9 * MEGABYTES <= grown(3) <= 1.5 * MEGABYTES
    assert (process.memory_info().rss - start) >> 20 < 0.3 * MEGABYTES
    assert grown(1) < 0.3 * MEGABYTES


def test_it_goes_back_at_once_where_that_is_asked_for():
    with returned_at_once():
        assert grown(3) < 0.3 * MEGABYTES


def test_an_error_inside_ends_it_too():
    with pytest.raises(RuntimeError), kept_for_reuse():
        raise RuntimeError
    assert grown(1) < 0.3 * MEGABYTES
