"""Work that an engine does in slices when it has time: always while nobody waits for tokens, else for a share of it. Plain Python."""

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

Work = Callable[[], bool]  # does one slice; False: that was the last


class IdleWork:
    """One such piece of work. ``share``: of the time in which requests are served, that it may take from them."""

    def __init__(self, work: Work, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._work, self._share, self._clock = work, share, clock
        self._credit = 0.0  # seconds saved up while serving
        self._slice = 0.0  # of the latest slice, seconds

    def serve(self, seconds: float) -> None:
        """Note that requests were served for so long. No more is saved up than a slice takes: a long wait earns no long interruption."""
        self._credit = min(self._credit + self._share * seconds, self._slice)

    def run(self, *, idle: bool) -> bool:
        """Do a slice if there is time for one; False when the work has ended. Work that fails ends."""
        if not idle and (not self._share or self._credit < self._slice):
            return True
        started = self._clock()
        try:
            goes_on = self._work()
        except Exception:
            log.exception("work in the engine's idle time failed and ends; serving goes on")
            return False
        self._slice = self._clock() - started
        self._credit = 0.0
        return goes_on
