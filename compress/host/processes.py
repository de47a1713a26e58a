"""Several processes that run one command together, as `torchrun` and `accelerate launch` start them.

The launcher's variables say which process this is. Training is shared (training/devices.py); everything else
is done by the first process, the main one, while the others wait for its files: a step that is finished lies
in the run's folder, whole. No message is needed for that, and no time limit of a message can be exceeded.
"""

import os
import sys
import time
from collections.abc import Callable

_POLL_SECONDS = 0.2


def process() -> tuple[int, int]:
    """(rank, count) of the processes that run this command."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this one writes, measures and prints."""
    return process()[0] == 0


def on_this_machine() -> tuple[int, int]:
    """(rank, count) among the processes that share this machine's cores and devices."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def wait(until: Callable[[], bool]) -> None:
    """Until the main process has done something; if it fails, the launcher ends this one."""
    while not until():
        time.sleep(_POLL_SECONDS)


def part() -> None:
    """Leave the group that training joined, if it did, so that a later run may join another."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from accelerate.state import AcceleratorState

        distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
