"""How often an answer under way is drawn: as often as costs the engine little."""

from __future__ import annotations

import os

OFTEN = 1 / 12  # seconds between two drawings at least: more would leave no time for keys
_SELDOM = 3.0  # seconds at most, whatever a drawing costs: that of a very long answer
_SHARE = 0.02  # of each core
_MOST = 0.25  # of one core
TYPING, PUT_OFF = 0.3, 0.6  # seconds: since the last key; that a drawing then waits


def rest(worked: float, took: float, cores: int = os.cpu_count() or 1) -> float:
    """Seconds until the next drawing, after one that took `took` seconds.

    The engine computes on every core, and drawing takes its time from one of them. So the rest is
    as long as makes the process's work a bounded share. worked: its processor seconds meanwhile.
    """
    share = min(_MOST, _SHARE * cores)
    return max(0.0, min(worked / share, _SELDOM) - took)
