"""The final test: once, on the sealed split, with an interval and two baselines beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.metrics.classification import ClassificationMeter, per_class, wilson_interval
from goodfit.outcome.baselines import ProbeResult


def final_result(
    meter: ClassificationMeter, *, class_names: Sequence[str], look: int, majority: int, probe: ProbeResult | None,
    probe_reason: str, targets: npt.NDArray[np.int64],
) -> dict[str, Any]:  # fmt: skip
    """The content of test.json: figures as fractions, counts as integers.

    Args:
        meter: The model's outputs on the test split.
        look: How often this test split has been looked at, this time included.
        majority: The most frequent class of the training split.
        probe: The linear probe on the frozen backbone; None if there is none.
        probe_reason: What backbone the probe stands on, or why there is none.
        targets: Classes of the test split, shape (samples,).
    """
    confusion = meter.confusion()
    hits, total = int(np.trace(confusion)), int(confusion.sum())
    low, high = wilson_interval(hits, total)
    rows = [{"class": n, **r} for n, r in zip(class_names, per_class(confusion), strict=True)]
    return {
        "n": total,
        "look": look,
        **meter.compute(),
        "low": low,
        "high": high,
        "interval": "95 % Wilson score interval of the accuracy",
        "baselines": {
            "majority": _baseline(int((targets == majority).sum()), total, f"always {class_names[majority]}"),
            "linear_probe": None
            if probe is None
            else {
                **_baseline(int((probe.predictions == targets).sum()), total, probe_reason),
                "l2_strength": probe.strength,
                "largest_gradient": probe.gradient,
            },
        },
        "per_class": rows,
        "confusion": confusion.tolist(),
    }


def _baseline(hits: int, total: int, reason: str) -> dict[str, Any]:
    low, high = wilson_interval(hits, total)
    return {"accuracy": hits / total, "low": low, "high": high, "what": reason}
