"""Where the time of training goes: every moment belongs to one part."""

from __future__ import annotations

import time

PARTS = ("data", "step", "host", "validation", "saving", "other")


class Clock:
    """A stopwatch that is never stopped: what passed since its last reading goes to the part that is named.

    So the parts add up to the whole, and one reading of the monotonic clock (50 ns) at each change of part is all it
    costs; the device is never waited for. Parts: "data", waiting for samples; "step", the update, with the wait for the
    device's results; "host", what the loop does between two steps; "validation"; "saving", checkpoints and the best
    state; "other", what is done twice or aside (a step that ran out of memory, branching to a cool-down).
    """

    def __init__(self) -> None:
        self._mark = self._began = time.monotonic()
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def spend(self, part: str) -> float:
        """Credit what passed since the last call to a part. Returns the present moment, in seconds of time.monotonic."""
        now = time.monotonic()
        self._seconds[part] += now - self._mark
        self._mark = now
        return now

    def spent(self, part: str) -> float:
        """Seconds credited to a part since the last lap."""
        return self._seconds[part]

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, as `seconds`, and of each part, as `data_seconds` and so on; then starts anew."""
        found = {"seconds": self._mark - self._began}
        found.update({f"{part}_seconds": seconds for part, seconds in self._seconds.items()})
        self._began = self._mark
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return found
