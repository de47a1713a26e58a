"""How busy a machine is with other programs, on the cores that this process may use.

Method. The system counts the seconds in which each core did something; what a process of ours had of them is
taken off. Time that a hypervisor gave to other guests counts as other programs'.
Limits: counted in hundredths of seconds, so a glance of less than a tenth says little; None where the system
does not count per core.
"""

import os
import time
from collections.abc import Iterable

_CROWDED = 0.1  # of the cores
_GLANCE = 0.3  # seconds


class Load:
    """The share of the cores that other programs had since this was made.

    `pids`: our processes beside this one; they must live until `others` is asked.
    """

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._pids = (os.getpid(), *pids)
        self._start = time.monotonic()
        self._busy, self._own = _busy_seconds(), self._own_seconds()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._start

    def others(self) -> float | None:
        """Between 0 and 1."""
        seconds, busy, before = self.seconds, _busy_seconds(), self._busy
        if busy is None or before is None or not seconds:
            return None
        used = sum(busy.values()) - sum(before.values()) - (self._own_seconds() - self._own)
        return min(1.0, max(0.0, used / (seconds * len(busy))))

    def _own_seconds(self) -> float:
        import psutil

        total = 0.0
        for pid in self._pids:
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.Error:  # ended: what it had counts as others', once
                continue
            total += times.user + times.system
        return total


def crowded() -> bool:
    """Whether other programs use more than a tenth of the cores right now; takes a moment."""
    load = Load()
    time.sleep(_GLANCE)
    return (load.others() or 0.0) > _CROWDED


def _busy_seconds() -> dict[int, float] | None:
    """Core -> seconds in which it was not idle."""
    import psutil  # here, because workers that report their own peak must not pay for it

    try:
        cores = psutil.cpu_times(percpu=True)
    except (OSError, RuntimeError):
        return None
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cores))
    # guests' seconds are among the user's already
    idle = {"idle", "iowait", "guest", "guest_nice"}
    return {
        core: sum(seconds for name, seconds in times._asdict().items() if name not in idle)
        for core, times in enumerate(cores)
        if core in mine
    }
