"""Ctrl-C and SIGTERM set a flag; the loop acts on it between two steps."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import FrameType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopFlag:
    """A context in which SIGINT and SIGTERM ask for a stop instead of ending the process.

    SIGHUP is ignored. The first signal lets the step in progress finish; a second SIGINT raises KeyboardInterrupt at once, which leaves the
    last committed checkpoint. Outside the main thread, where Python handles no signals, nothing is installed. The
    handlers found are put back at the end.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return EXIT_CODES.get(self.signal or signal.SIGINT, 130)  # type: ignore[call-overload]

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal is not None

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._handle)
            if hasattr(signal, "SIGHUP"):  # a terminal that closes does not end training
                self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        with contextlib.suppress(OSError):  # the terminal may be gone; the stop is not
            print("\nfinishing this step and saving; press Ctrl-C again to stop now", file=sys.stderr, flush=True)
