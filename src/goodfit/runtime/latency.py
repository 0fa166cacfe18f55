"""How long one image takes as it is served: the bytes of a file in, the answer out, one at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from goodfit.runtime.predictor import Predictor

ROUNDS = 5
CALLS = 40  # of a round: its 95th percentile is the third slowest
FEWEST_CALLS = 20
ROUND_SECONDS = 0.8
MOST_SECONDS = 15.0  # for all rounds, of which there is one at least
WARM_UP = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds of one image: median and 95th percentile, and the median share of decoding and scaling."""

    p50: float
    p95: float
    preparing: float


def serving_latency(predictor: Predictor, files: Sequence[bytes], *, rounds: int = ROUNDS) -> Latency:
    """Time `predictor.predict([file])` over a few files in turn.

    What else runs on the machine can only add time, so of five rounds, or as many as fit into 15 seconds, the one with the
    smallest 95th percentile is taken; on a machine that is never quiet that is still too high, never too low.

    Args:
        predictor: With as many threads as production will have.
        files: Bytes of image files that are typical of what will be served.
    """
    for number in range(WARM_UP):
        start = time.perf_counter()
        predictor.predict([files[number % len(files)]])
        seconds = time.perf_counter() - start
    calls = max(FEWEST_CALLS, min(CALLS, int(ROUND_SECONDS / max(seconds, 1e-6))))
    best: tuple[float, float] | None = None
    for _ in range(max(1, min(rounds, int(MOST_SECONDS / (calls * max(seconds, 1e-6)))))):
        times = []
        for number in range(calls):
            start = time.perf_counter()
            predictor.predict([files[number % len(files)]])
            times.append(time.perf_counter() - start)
        found = (statistics.quantiles(times, n=20, method="inclusive")[18], statistics.median(times))
        best = found if best is None else min(best, found)
    preparing = []
    for number in range(FEWEST_CALLS):
        start = time.perf_counter()
        predictor.pixels(files[number % len(files)])
        preparing.append(time.perf_counter() - start)
    assert best is not None
    return Latency(p50=1e3 * best[1], p95=1e3 * best[0], preparing=1e3 * statistics.median(preparing))
