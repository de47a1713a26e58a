"""What belongs to the whole process stays as the caller had it: threads, dtype, generators, gradients."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def unchanged_process(threads: int | None = None) -> Iterator[None]:
    """While the block, or the function decorated by it, runs, the process may be set as it needs.

    Args:
        threads: of torch's operations on the CPU in it; None: the caller's.
    """
    count, dtype, enabled = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    ours, numbers = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            if threads is not None:
                torch.set_num_threads(threads)
            yield
    finally:
        torch.set_num_threads(count)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(enabled)
        random.setstate(ours)
        np.random.set_state(numbers)
