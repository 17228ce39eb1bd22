"""What lets the fencer act in time whatever the host is busy with, as far as it is allowed to have it."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

_ALL_MEMORY = 3
"""MCL_CURRENT | MCL_FUTURE"""
_PRIORITY = 10
"""Among realtime processes; below the kernel's own interrupt threads."""
_NICEST = -20


def take() -> list[str]:
    """Take what there is, and return what is lacking, in words for a person."""
    lacks = []
    unlimited = os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    # With a limit it would be refused memory later, when it has to act.
    if not unlimited or ctypes.CDLL(None).mlockall(_ALL_MEMORY) != 0:
        lacks.append("locked memory")
    try:
        Path("/proc/self/oom_score_adj").write_text("-1000", encoding="ascii")
    except OSError:
        lacks.append("protection from the OOM killer")
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    except OSError:
        lacks.append("realtime priority")
        try:
            os.setpriority(os.PRIO_PROCESS, 0, _NICEST)
        except OSError:
            lacks.append("a priority above others")
    return lacks
